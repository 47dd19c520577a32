"""A training set with repeats, and the same one with the copies written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.runtime import keyed_random


def with_repeats(data: EncodedImages, repeats: Sequence[int]) -> EncodedImages:
    """The set, each image of which training sees so often."""
    column = tuple(map(str, repeats))
    return replace(data, images=replace(data.images, columns={**data.images.columns, "repeats": column}))


class WrittenOut(EncodedImages):
    """Copies under ids of their own, `ID#NUMBER`, that draw the noise of their originals: what the weights stand for.

    With noise of their own the copies' sums would be equal in expectation only; so they are equal to rounding.
    """

    @property
    def id_keys(self) -> Tensor:
        """Hashes of the originals' ids."""
        return keyed_random.hash_texts([name.partition("#")[0] for name in self.ids])

    def subset(self, indices: Sequence[int]) -> EncodedImages:
        """Some of them, which go on drawing the noise of their originals."""
        part = super().subset(indices)
        return WrittenOut(**{each.name: getattr(part, each.name) for each in fields(part)})


def written_out(data: EncodedImages, repeats: Sequence[int]) -> WrittenOut:
    """The set in which each image physically occurs so often."""
    rows = [index for index, count in enumerate(repeats) for _ in range(count)]
    numbers = [number for count in repeats for number in range(count)]
    ids = tuple(f"{data.ids[index]}#{number}" for index, number in zip(rows, numbers, strict=True))
    images = replace(
        data.images,
        ids=ids,
        captions=tuple(data.images.captions[index] for index in rows),
        pixels=data.images.pixels[rows],
        columns={"license": ("CC0-1.0",) * len(rows)},
        fingerprint=f"{data.images.fingerprint} written out",
    )
    group = data.groups[0].take(np.array(rows))
    return WrittenOut(images, (group,), data.empty, f"{data.fingerprint} written out {list(repeats)}")


def by_image(copies: np.ndarray, repeats: Sequence[int]) -> list[np.ndarray]:
    """Values of the copies, those of one image together."""
    return np.split(copies, np.cumsum(repeats)[:-1])


def double(values: Sequence[int]) -> Tensor:
    """As float64."""
    return torch.tensor(values, dtype=torch.float64)
