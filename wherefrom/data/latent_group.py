"""Encoded images whose latents have one shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.models.conditioning import Conditioning
from wherefrom.runtime.mapped_arrays import JoinedRows, RowView, take_rows


@dataclass(frozen=True)
class LatentGroup:
    """Encoded images whose latents have one shape.

    Latents and conditioning may be mapped from disk, in float16 or as views of rows: index them, then bring what was
    taken to the model's type.

    Attributes:
        latents: Scaled latents of each image and of its mirror image, shape (M, 2, C, H, W).
        conditioning: Conditioning of each caption, with leading axes (M, K).
    """

    latents: Float[Tensor, "m 2 c h w"] | RowView | JoinedRows
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        channels, rows, columns = (int(side) for side in self.latents.shape[2:])
        return channels, rows, columns

    def take(self, rows: NDArray[np.intp]) -> LatentGroup:
        """These rows."""
        return LatentGroup(take_rows(self.latents, rows), self.conditioning.map(lambda each: take_rows(each, rows)))
