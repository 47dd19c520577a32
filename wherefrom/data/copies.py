"""Synthetic near-duplicates in a training set: copies of images, shifted by a pixel and slightly recoloured."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from wherefrom.data.image_set import ImageSet
from wherefrom.data.ragged_pixels import join_pixels, stacked
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import identity_hash
from wherefrom.runtime.stable_names import settings_identity

_STEPS = tuple((rows, columns) for rows in (-1, 0, 1) for columns in (-1, 0, 1) if (rows, columns) != (0, 0))
_LEAST, _MOST = 4, 12  # change of a colour channel, of 255


@dataclass(frozen=True)
class Copies:
    """Configuration of near-duplicates.

    Attributes:
        ids: Ids of the originals.
        count: Number of copies of each.
        seed: Seed of their shifts and colours.

    Raises:
        ValueError: There are no originals, one is named twice, or `count` is not between 1 and 8, the number of
            neighbouring pixels.
    """

    ids: list[str] = field(default_factory=list)
    count: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ids or len(set(self.ids)) < len(self.ids) or not 1 <= self.count <= len(_STEPS):
            raise ValueError(
                f"copies needs originals, each named once, and 1 to {len(_STEPS)} copies of each; given ids {self.ids} "
                f"and count {self.count}."
            )

    def of(self, name: str) -> list[str]:
        """Returns the ids of the copies of an original."""
        return [f"{name}/copy{number}" for number in range(1, self.count + 1)]

    @property
    def planted(self) -> list[str]:
        """Ids of all copies."""
        return [copy for name in self.ids for copy in self.of(name)]


def plant(images: ImageSet, copies: Copies) -> ImageSet:
    """Appends the copies to the images, with the captions and columns of their originals.

    Args:
        images: The training images.
        copies: Configuration of the copies.

    Raises:
        ValueError: An original is not a training image, or the id of a copy is in use.
    """
    where = {name: index for index, name in enumerate(images.ids)}
    unknown = [name for name in copies.ids if name not in where]
    if unknown:
        raise ValueError(
            f"copies names {len(unknown)} images that are not in the training set, such as {unknown[0]!r}; its ids "
            f"look like {images.ids[0]!r}."
        )
    origins = [where[name] for name in copies.ids for _ in range(copies.count)]
    drawn = [
        _near(np.asarray(images.pixels[where[name]]), name, number, copies.seed)
        for name in copies.ids
        for number in range(copies.count)
    ]
    return ImageSet(
        ids=(*images.ids, *copies.planted),
        captions=(*images.captions, *(images.captions[index] for index in origins)),
        pixels=join_pixels(images.pixels, stacked(drawn)),
        columns={name: (*column, *(column[index] for index in origins)) for name, column in images.columns.items()},
        fingerprint=identity_hash({"of": images.fingerprint, "copies": settings_identity(copies)}),
        skipped=images.skipped,
    )


def _near(
    pixels: UInt8[NDArray[np.uint8], "h w 3"], name: str, number: int, seed: int
) -> UInt8[NDArray[np.uint8], "h w 3"]:
    """Creates one copy; the copies of an original are shifted in different directions."""
    turn = int(keyed_random.bits(keyed_random.combine(seed, keyed_random.hash_text(f"copies of {name}")), 1)) % len(
        _STEPS
    )
    rows, columns = _STEPS[(turn + number) % len(_STEPS)]
    uniforms = keyed_random.uniform(
        keyed_random.combine(seed, keyed_random.hash_text(f"colours of {name}"), number), 6
    ).numpy()
    colours = np.where(uniforms[:3] < 0.5, -1, 1) * np.rint(_LEAST + uniforms[3:] * (_MOST - _LEAST))
    # Edge padding: the shift adds no edge that the original does not have.
    moved = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = pixels.shape[:2]
    moved = moved[1 - rows : 1 - rows + height, 1 - columns : 1 - columns + width]
    near: NDArray[np.uint8] = np.clip(moved.astype(np.int64) + colours.astype(np.int64), 0, 255).astype(np.uint8)
    return near
