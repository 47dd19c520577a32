"""Regions: the part of a generated image whose origin is asked for (AbU, section 4.3).

The query's loss is then the mean over the latent cells inside, each weighted by the share of its area that is inside;
training losses stay those of whole images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.data.image_folder import UNREADABLE, load_image
from wherefrom.runtime.artifacts import hash_file

_GREY, _FADED = 160.0, 0.25  # what is outside keeps this share of its colours


@dataclass(frozen=True)
class Region:
    """A part of an image.

    Attributes:
        name: How it is called in ids and reports.
        mask: Share of each image pixel that is inside, from 0 to 1.

    Raises:
        ValueError: The mask is not an image of numbers from 0 to 1, or nothing is inside.
    """

    name: str
    mask: Float[NDArray[np.float32], "h w"]

    def __post_init__(self) -> None:
        mask = self.mask
        if mask.ndim != 2 or not (np.isfinite(mask).all() and mask.min() >= 0 and mask.max() <= 1):
            raise ValueError(
                f"The mask of region {self.name!r} must be an image (H, W) of numbers from 0 (outside) to 1 (inside); "
                f"it has shape {mask.shape}."
            )
        if mask.max() == 0:
            raise ValueError(f"Region {self.name!r} is empty: its mask is 0 everywhere. Paint the inside white.")

    @classmethod
    def from_box(cls, box: Sequence[int], size: tuple[int, int]) -> Region:
        """The inside of a box.

        Args:
            box: (left, top, right, bottom) in image pixels; right and bottom are the first outside.
            size: (height, width) of the image.

        Raises:
            ValueError: The box is empty, inverted, or not inside the image.
        """
        height, width = size
        if len(box) != 4:
            raise ValueError(f"A box is [left, top, right, bottom]; given {list(box)}.")
        left, top, right, bottom = box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"Box {list(box)} is not a part of the image, which is {width} × {height} pixels: [left, top, right, "
                f"bottom] needs 0 <= left < right <= {width} and 0 <= top < bottom <= {height}."
            )
        mask = np.zeros(size, dtype=np.float32)
        mask[top:bottom, left:right] = 1.0
        return cls(f"box {left},{top},{right},{bottom}", mask)

    @classmethod
    def from_file(cls, path: str | Path, size: tuple[int, int]) -> Region:
        """What is white in a mask image; grey is partly inside.

        Args:
            path: The mask.
            size: (height, width) of the image that it belongs to.

        Raises:
            ValueError: The file is missing, unreadable, or of another size, or nothing in it is white.
        """
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"Mask {file} is not a file.")
        try:
            mask = load_image(file, None)[..., 0].astype(np.float32) / 255.0
        except UNREADABLE as error:
            raise ValueError(f"Mask {file} cannot be read: {error}.") from error
        if mask.shape != size:
            raise ValueError(
                f"Mask {file} is {mask.shape[1]} × {mask.shape[0]} pixels, its image {size[1]} × {size[0]}: "
                "save it at the image's size."
            )
        return cls(f"mask {file.stem}-{hash_file(file)[:8]}", mask)

    def show(self, pixels: UInt8[NDArray[np.uint8], "h w 3"]) -> UInt8[NDArray[np.uint8], "h w 3"]:
        """The image with what is outside faded towards grey."""
        kept = _FADED + (1.0 - _FADED) * self.mask[..., None]
        return np.asarray(np.rint(kept * pixels + (1.0 - kept) * _GREY), dtype=np.uint8)

    def weights(self, size: tuple[int, int]) -> Float[Tensor, "i j"]:
        """The share of each latent cell's area that is inside.

        Args:
            size: (rows, columns) of the latent.
        """
        return F.adaptive_avg_pool2d(torch.from_numpy(self.mask)[None, None].double(), size)[0, 0]
