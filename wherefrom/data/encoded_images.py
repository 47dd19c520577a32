"""Latents and conditioning of a data set, computed once, kept with a manifest and memory-mapped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import Dataset

from wherefrom.data.encoded_rows import EncodedRows
from wherefrom.data.image_set import ImageSet, joined_image_sets, keep_indices
from wherefrom.data.latent_group import LatentGroup as LatentGroup
from wherefrom.data.weighted_images import WeightedImages
from wherefrom.models.conditioning import Conditioning, concatenated
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.encoders import CaptionEncoder, LatentEncoder
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store, identity_hash
from wherefrom.runtime.content_rows import KEY_BYTES, Keys
from wherefrom.runtime.mapped_arrays import (
    JoinedRows,
    RowView,
    join_rows,
    write_array,
)
from wherefrom.runtime.ranges import check_ranges
from wherefrom.runtime.salts import Salt
from wherefrom.training.keyed_batches import CAPTION, DROP, LatentBatch, Visit, flips, visit_keys, visit_times

_logger = logging.getLogger(__name__)
_KEYS = "image_keys.npy"


@dataclass(frozen=True)
class EncodedImages(WeightedImages):
    """A training set as the diffusion model sees it, in groups by the shape of the latents.

    Attributes:
        images: The images that were encoded, in the same order.
        groups: The encoded images by shape.
        empty: Conditioning of the empty prompt.
        fingerprint: Hash of everything that decides the values.
        mapped: Whether latents and conditioning are read from disk where they are used.
        members: Positions in `images` of each group's rows; None where there is one group in the images' order.

    Raises:
        ValueError: Groups have the same shape or unlike conditioning, or members do not fit.
    """

    images: ImageSet
    groups: tuple[LatentGroup, ...]
    empty: Conditioning
    fingerprint: str
    mapped: bool = False
    members: tuple[Int64[Tensor, " m"], ...] | None = None

    def __post_init__(self) -> None:
        members = self.members
        if not self.groups or (members is None and len(self.groups) > 1):
            raise ValueError("Encoded images of several shapes need the positions of each group's rows.")
        if members is None:
            return
        if [len(each) for each in members] != [len(group) for group in self.groups] or not torch.equal(
            torch.cat(list(members)).sort().values, torch.arange(len(self.images))
        ):
            raise ValueError("The groups' members are not the positions of all images, each once.")

    @classmethod
    def of_one_shape(
        cls,
        images: ImageSet,
        *,
        latents: Float[Tensor, "n 2 c h w"] | RowView | JoinedRows,
        conditioning: Conditioning,
        empty: Conditioning,
        fingerprint: str,
        mapped: bool = False,
    ) -> EncodedImages:
        """Images whose latents all have one shape, in the images' order."""
        return cls(images, (LatentGroup(latents, conditioning),), empty, fingerprint, mapped)

    @cached_property
    def _places(self) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
        """Group, and row in the group, of each image."""
        group, row = torch.zeros(len(self), dtype=torch.int64), torch.arange(len(self))
        for number, positions in enumerate(self.members or ()):
            group[positions], row[positions] = number, torch.arange(len(positions))
        return group, row

    @property
    def captions_per_image(self) -> int:
        """K."""
        return int(next(iter(self.groups[0].conditioning.values())).shape[1])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents.

        Raises:
            ValueError: They have several shapes.
        """
        return self._only_group().shape

    def _only_group(self) -> LatentGroup:
        if len(self.groups) > 1:
            shapes = ", ".join("×".join(map(str, group.shape)) for group in self.groups)
            raise ValueError(
                f"The latents have several shapes ({shapes}), but one is needed here: bring the images to one size."
            )
        return self.groups[0]

    def by_shape(self, positions: range) -> Iterator[Int64[Tensor, " m"]]:
        """These positions, in parts whose latents have one shape and can be one batch."""
        whole = torch.arange(positions.start, positions.stop)
        if len(self.groups) == 1:
            yield whole
            return
        groups = self._places[0][whole]
        for number in groups.unique().tolist():
            yield whole[groups == number]

    def latents_at(self, positions: Int64[Tensor, " b"], flip: Int64[Tensor, " b"] | int) -> Float[Tensor, "b c h w"]:
        """The latents of images or of their mirror images.

        Args:
            positions: Which images; of one shape (`by_shape`).
            flip: 1 for the mirror image.

        Raises:
            ValueError: They have several shapes.
        """
        group, rows = self._rows(positions)
        latents: Tensor = group.latents[rows, flip]
        return latents

    def conditioning_at(
        self, positions: Int64[Tensor, " b"], caption: Int64[Tensor, " b"] | int | slice
    ) -> Conditioning:
        """Conditioning of one caption of each of these images, or of some; leading axes (B,) or (B, K)."""
        if self.members is None:
            return self.groups[0].conditioning.at(positions, caption)
        group, row = (each[positions] for each in self._places)
        parts, places = [], []
        for number in group.unique().tolist():
            mine = (group == number).nonzero()[:, 0]
            of_mine = caption[mine] if isinstance(caption, Tensor) and caption.dim() else caption
            parts.append(self.groups[number].conditioning.at(row[mine], of_mine))
            places.append(mine)
        return concatenated(parts).at(torch.cat(places).argsort())

    def _rows(self, positions: Int64[Tensor, " b"]) -> tuple[LatentGroup, Int64[Tensor, " b"]]:
        if self.members is None:
            return self.groups[0], positions
        group, row = (each[positions] for each in self._places)
        if len(group) and bool((group != group[0]).any()):
            self._only_group()
        return self.groups[int(group[0]) if len(group) else 0], row

    def check(self, model: DiffusionModel) -> None:
        """Refuses a model that cannot take these latents and captions.

        Raises:
            ValueError: A shape or a name is not what the model takes.
        """
        for group in self.groups:
            model.check(group.latents[0, 0], self.empty)

    @property
    def held_bytes(self) -> int:
        """Memory that latents and conditioning take for as long as the set is there."""
        return 0 if self.mapped else sum(int(each.latents.nbytes) + each.conditioning.nbytes for each in self.groups)

    @property
    def ids(self) -> tuple[str, ...]:
        """The images' ids."""
        return self.images.ids

    @property
    def id_keys(self) -> Int64[Tensor, " n"]:
        """Hash of each image's id."""
        return keyed_random.hash_texts(self.images.ids)

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Sequence[int]) -> EncodedImages:
        """The images at these positions; its fingerprint names them."""
        chosen = list(indices)
        rows = np.asarray(chosen, dtype=np.intp)
        ids = [self.ids[index] for index in chosen]
        fingerprint = identity_hash({"of": self.fingerprint, "ids": ids})
        images = self.images.subset(chosen)
        if self.members is None:
            return EncodedImages(images, (self.groups[0].take(rows),), self.empty, fingerprint, self.mapped)
        group, row = (each[torch.from_numpy(rows)] for each in self._places)
        parts = [
            (each.take(row[group == number].numpy()), (group == number).nonzero()[:, 0])
            for number, each in enumerate(self.groups)
            if len(self.groups) == 1 or bool((group == number).any())
        ]
        groups, members = zip(*(parts or [(self.groups[0].take(rows), torch.arange(0))]), strict=True)
        return EncodedImages(images, groups, self.empty, fingerprint, self.mapped, members)

    def sample(self, count: int) -> list[int]:
        """Positions of up to `count` images, in order, that are chosen by the hashes of their ids alone."""
        return sorted(torch.argsort(keyed_random.combine(Salt.TRAINING_SAMPLE, self.id_keys))[:count].tolist())

    def without(self, exclude: Sequence[str]) -> EncodedImages:
        """The set without these ids.

        Raises:
            ValueError: An id is not in the set.
        """
        return self.subset(keep_indices(self.ids, exclude)) if exclude else self


def joined(first: EncodedImages, second: EncodedImages) -> EncodedImages:
    """Both sets as one; what is on disk stays there. The empty prompt is the first's.

    Raises:
        ValueError: An id is in both, or shapes differ.
    """
    one, other = first._only_group(), second._only_group()
    if one.shape != other.shape:
        raise ValueError(f"Latents of shape {(2, *one.shape)} and {(2, *other.shape)} cannot be one set.")
    shapes = [{name: tuple(each.shape[1:]) for name, each in group.conditioning.items()} for group in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"Conditioning of shapes {shapes[0]} and {shapes[1]} cannot be one set.")
    return EncodedImages.of_one_shape(
        joined_image_sets(first.images, second.images),
        latents=join_rows(one.latents, other.latents),
        conditioning=Conditioning(
            {name: join_rows(each, other.conditioning[name]) for name, each in one.conditioning.items()}
        ),
        empty=first.empty,
        fingerprint=identity_hash({"of": [first.fingerprint, second.fingerprint]}),
        mapped=first.mapped,
    )


def _silent(message: str) -> None:
    """Says nothing."""


def report_cut(text: CaptionEncoder, captions: Sequence[str], what: str) -> int:
    """How many of these are longer than the text encoder reads; logged where there are any."""
    cut = text.cut(captions)
    if cut:
        _logger.warning(
            "%d of %d %s are longer than the text encoder reads (%d tokens), so their ends count for nothing; the "
            "first is %r.",
            len(cut),
            len(captions),
            what,
            text.length,
            captions[cut[0]],
        )
    return len(cut)


def encode_image_set(
    image_set: ImageSet,
    *,
    encoder: LatentEncoder,
    store: Store,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    half: bool = False,
    log: Callable[[str], None] = _silent,
) -> EncodedImages:
    """Latents and conditioning of the images, from the store if they are there.

    Latents are kept by the content of each image and conditioning by that of each caption, so what another set made is
    found again: a set that grows by 1 % costs 1 %, and a subset costs nothing. Neither is ever held in memory as a
    whole, and an interrupted run goes on from its last finished batch.

    Args:
        image_set: The images.
        encoder: Autoencoder and text encoder; their weights are part of the identity, so the cache is never stale.
        store: Where the arrays are kept.
        batch_size: Images encoded at a time.
        progress: Called with (done, total) images: first their latents, then their captions.
        half: Keep latents and embeddings in float16, which takes half the disk.
        log: Receives a line that says how large the missing arrays will be before any is made.

    Captions that are longer than the text encoder reads lose their ends, as in training; how many do is logged, and
    kept in the manifest. Images of several sizes are encoded size by size, each as the images of that size alone.

    Raises:
        ValueError: A value is too large for float16.
        StorageError: The store could not be written; finished batches are kept.
    """
    by_size = list(image_set.by_size())
    if len(by_size) > 1:
        parts = [
            encode_image_set(
                each, encoder=encoder, store=store, batch_size=batch_size, progress=progress, half=half, log=log
            )
            for _, each, _ in by_size
        ]
        return _grouped(image_set, parts, [torch.from_numpy(positions) for _, _, positions in by_size])
    if by_size:
        encoder.text.sized(by_size[0][0])
    identity = {
        "pictures": image_set.fingerprint,
        "ids": identity_hash({"ids": list(image_set.ids)}),
        **encoder.identity(),
        **({"dtype": "float16"} if half else {}),
    }
    rows = EncodedRows(image_set, encoder=encoder, store=store, batch_size=batch_size, half=half)

    def build(folder: Path) -> Mapping[str, Any]:
        keys = rows.image_keys()
        write_array(folder / _KEYS, (len(keys), KEY_BYTES), [keys.view(np.uint8)], np.uint8)
        rows.fill(keys, progress, log)
        cut = report_cut(encoder.text, rows.captions, "captions")
        return {"captions_cut": cut} if cut else {}

    folder = store.make("encoded_images", identity, build)
    keys: Keys = np.load(folder / _KEYS).reshape(-1).view(f"S{KEY_BYTES}")
    rows.fill(keys, progress, log)  # what was there when the set was made may have been deleted since
    return EncodedImages.of_one_shape(
        image_set,
        latents=rows.latents(keys),
        conditioning=rows.conditioning(),
        empty=rows.empty(),
        fingerprint=identity_hash(identity),
        mapped=True,
    )


def _grouped(
    image_set: ImageSet, parts: Sequence[EncodedImages], members: Sequence[Int64[Tensor, " m"]]
) -> EncodedImages:
    """Images of several sizes, from the images of each."""
    return EncodedImages(
        image_set,
        tuple(part.groups[0] for part in parts),
        parts[0].empty,
        identity_hash({"of": [part.fingerprint for part in parts], "ids": list(image_set.ids)}),
        all(part.mapped for part in parts),
        tuple(members),
    )


class LatentVisits(Dataset[LatentBatch]):
    """Batches for training the diffusion model: flip, caption and caption dropout are keyed by (seed, id, visit).

    Args:
        data: The training set.
        seed: Seed of these draws.
        flip_share: Probability of the mirror image.
        caption_dropout: Probability of the empty caption, for classifier-free guidance.

    Raises:
        ValueError: Captions are to be dropped, but the prompt embeddings of the empty prompt are not known; or the
            images have several sizes, so that a batch would not be one array.
    """

    def __init__(self, data: EncodedImages, seed: int, flip_share: float = 0.5, caption_dropout: float = 0.1) -> None:
        data.latent_shape  # noqa: B018  refuses several shapes
        if caption_dropout > 0 and any(bool(each.isnan().any()) for each in data.empty.values()):
            raise ValueError(
                "caption_dropout needs the states of the empty caption, which the ready-made arrays do not hold: give "
                "null_states, or set caption_dropout to 0."
            )
        check_ranges(flip_share=flip_share, caption_dropout=caption_dropout)
        self.data, self.seed = data, seed
        self.id_keys = data.id_keys
        self.flip_share, self.caption_dropout = flip_share, caption_dropout

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, visits: list[Visit]) -> LatentBatch:
        """The batch of these visits."""
        index, visit = (torch.tensor(column) for column in zip(*visits, strict=True))
        keys = visit_keys(self.seed, self.id_keys[index], visit)
        flip = flips(keys, self.flip_share).long()
        captions = self.data.captions_per_image
        caption = (keyed_random.uniform(keyed_random.combine(CAPTION, keys))[:, 0] * captions).long()
        dropped = keyed_random.uniform(keyed_random.combine(DROP, keys))[:, 0] < self.caption_dropout
        conditioning = self.data.conditioning_at(index, caption).float().dropped(dropped, self.data.empty)
        times = visit_times(self.seed, self.id_keys[index], visit)
        return LatentBatch(keys, times, _whole(self.data.latents_at(index, flip)), conditioning)


def _whole(values: Tensor) -> Tensor:
    """Numbers that were kept in float16 as float32, in which training adds noise to them."""
    return values.float() if values.dtype == torch.float16 else values
