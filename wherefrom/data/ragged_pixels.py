"""Pixels of images of several sizes: one array for each size, indexed like one array of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.models.image_sizes import Size, words_of
from wherefrom.runtime.mapped_arrays import JoinedRows, RowView, join_rows, take_rows

OneSize = UInt8[NDArray[np.uint8], "n h w 3"] | RowView | JoinedRows


class RaggedPixels:
    """Images of several sizes in one order; each size's may be memory-mapped.

    A number gives one image, anything else the images of those positions: as one array if they have one size, and else
    as `RaggedPixels`. What needs all to have one size (`shape`, NumPy's functions) is refused with a remedy.

    Args:
        arrays: The images of each size.
        group: Which array each image is in.
        row: Its row there.
    """

    def __init__(self, arrays: Sequence[OneSize], group: NDArray[np.intp], row: NDArray[np.intp]) -> None:
        self.arrays, self.group, self.row = list(arrays), group, row

    @classmethod
    def in_order(cls, arrays: Sequence[OneSize], sizes: Sequence[Size]) -> RaggedPixels:
        """Images whose arrays hold them in the order in which each size occurs.

        Args:
            arrays: The images of each size.
            sizes: (height, width) of every image.
        """
        number = {(int(each.shape[1]), int(each.shape[2])): place for place, each in enumerate(arrays)}
        group = np.array([number[size] for size in sizes], dtype=np.intp)
        row = np.zeros(len(group), dtype=np.intp)
        for place in range(len(arrays)):
            row[group == place] = np.arange(int((group == place).sum()))
        return cls(arrays, group, row)

    def __len__(self) -> int:
        return len(self.group)

    @property
    def dtype(self) -> Any:
        """Element type."""
        return self.arrays[0].dtype

    @property
    def nbytes(self) -> int:
        """Size of these images in bytes."""
        return sum(3 * height * width for height, width in self.sizes)

    @property
    def sizes(self) -> list[Size]:
        """(height, width) of every image."""
        of_group = [(int(each.shape[1]), int(each.shape[2])) for each in self.arrays]
        return [of_group[group] for group in self.group.tolist()]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3).

        Raises:
            ValueError: There are several sizes.
        """
        raise self._several()

    def _several(self) -> ValueError:
        found = sorted(set(self.sizes))
        shown = ", ".join(words_of(size) for size in found[:5]) + (", …" if len(found) > 5 else "")
        return ValueError(
            f"The images have {len(found)} sizes ({shown}), but one is needed here: bring the images to one size, "
            "without buckets."
        )

    def take(self, positions: NDArray[np.intp]) -> OneSize | RaggedPixels:
        """The images at these positions, in this order."""
        group, row = self.group[positions], self.row[positions]
        here = np.unique(group)
        if len(here) <= 1:
            return take_rows(self.arrays[int(here[0]) if len(here) else 0], row)  # type: ignore[no-any-return]
        return RaggedPixels(self.arrays, group, row)

    def __getitem__(self, key: Any) -> Any:
        head, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(head, slice):
            taken = self.take(np.arange(*head.indices(len(self))))
            if rest and isinstance(taken, RaggedPixels):
                raise taken._several()
            return taken[(slice(None), *rest)] if rest else taken
        positions = np.asarray(head.numpy() if isinstance(head, Tensor) else head)
        if positions.ndim == 0:
            place = range(len(self))[int(positions)]
            return self.arrays[int(self.group[place])][(int(self.row[place]), *rest)]
        return self.take(np.arange(len(self))[positions])[(slice(None), *rest) if rest else slice(None)]

    def __iter__(self) -> Iterator[Any]:
        return (self[position] for position in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        raise self._several()


Pixels = OneSize | RaggedPixels


def sizes_of(pixels: Pixels) -> list[Size]:
    """(height, width) of every image."""
    if isinstance(pixels, RaggedPixels):
        return pixels.sizes
    height, width = (int(side) for side in pixels.shape[1:3])
    return [(height, width)] * len(pixels)


def by_size(pixels: Pixels) -> Iterator[tuple[Size, NDArray[np.intp]]]:
    """Each size that occurs, with the positions of its images."""
    if not isinstance(pixels, RaggedPixels):
        height, width = (int(side) for side in pixels.shape[1:3])
        yield (height, width), np.arange(len(pixels))
        return
    for number in np.unique(pixels.group).tolist():
        height, width = (int(side) for side in pixels.arrays[number].shape[1:3])
        yield (height, width), np.flatnonzero(pixels.group == number)


def take_pixels(pixels: Pixels, positions: NDArray[np.intp]) -> Pixels:
    """The images at these positions, in this order."""
    if isinstance(pixels, RaggedPixels):
        return pixels.take(positions)
    return take_rows(pixels, positions)  # type: ignore[no-any-return]


def join_pixels(first: Pixels, second: Pixels) -> Pixels:
    """One set's images, then the other's; what is on disk stays there."""
    ragged = isinstance(first, RaggedPixels) or isinstance(second, RaggedPixels)
    if not ragged and first.shape[1:] == second.shape[1:]:
        return join_rows(first, second)  # type: ignore[no-any-return]
    one, other = (
        each if isinstance(each, RaggedPixels) else RaggedPixels.in_order([each], sizes_of(each))
        for each in (first, second)
    )
    numbers = {(int(each.shape[1]), int(each.shape[2])): place for place, each in enumerate(one.arrays)}
    arrays, group, row = list(one.arrays), other.group.copy(), other.row.copy()
    for place, each in enumerate(other.arrays):
        size, mine = (int(each.shape[1]), int(each.shape[2])), other.group == place
        if size in numbers:
            number = numbers[size]
            row[mine] += len(arrays[number])
            arrays[number] = join_rows(arrays[number], each)
        else:
            number = len(arrays)
            arrays.append(each)
        group[mine] = number
    return RaggedPixels(arrays, np.concatenate([one.group, group]), np.concatenate([one.row, row]))


def stacked(images: Sequence[UInt8[NDArray[np.uint8], "h w 3"]]) -> Pixels:
    """Images in memory: one array if they have one size."""
    sizes = [(int(each.shape[0]), int(each.shape[1])) for each in images]
    groups = [
        np.stack([each for each, size in zip(images, sizes, strict=True) if size == one])
        for one in dict.fromkeys(sizes)
    ]
    return groups[0] if len(groups) == 1 else RaggedPixels.in_order(groups, sizes)
