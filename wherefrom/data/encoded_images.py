"""Latents and caption states of a data set, computed once, kept with a manifest and memory-mapped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import Dataset

from wherefrom.data.image_set import ImageSet, joined_image_sets, keep_indices
from wherefrom.data.stream import CAPTION, DROP, LatentBatch, Visit, flips, visit_keys, visit_times
from wherefrom.models.encoders import CaptionEncoder, LatentEncoder
from wherefrom.models.pixels import to_float
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store, identity_hash
from wherefrom.runtime.mapped_arrays import (
    GrowingArray,
    JoinedRows,
    RowView,
    announce_size,
    join_rows,
    map_array,
    take_rows,
    write_array,
)
from wherefrom.runtime.salts import Salt

_logger = logging.getLogger(__name__)
LATENTS, STATES, NULL_STATES = "latents.npy", "states.npy", "null_states.npy"


@dataclass(frozen=True)
class EncodedImages:
    """A training set as the diffusion model sees it.

    Latents and states may be mapped from disk, in float16 or as views of rows: index them, then bring what was taken to
    the model's type.

    Attributes:
        images: The images that were encoded, in the same order.
        latents: Scaled latents of each image and of its mirror image, shape (N, 2, C, H, W).
        states: Token states of each caption, shape (N, K, L, D); where the model is told more of a caption, the rest is
            in rows below them (`wherefrom.models.families.base`).
        null_states: Token states of the empty caption, shape (L, D).
        fingerprint: Hash of everything that decides the values.
        mapped: Whether latents and states are read from disk where they are used.
    """

    images: ImageSet
    latents: Float[Tensor, "n 2 c h w"] | RowView | JoinedRows
    states: Float[Tensor, "n k l d"] | RowView | JoinedRows
    null_states: Float[Tensor, "l d"]
    fingerprint: str
    mapped: bool = False

    @property
    def held_bytes(self) -> int:
        """Memory that latents and states take for as long as the set is there."""
        return 0 if self.mapped else int(self.latents.nbytes + self.states.nbytes)

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
        return EncodedImages(
            self.images.subset(chosen),
            take_rows(self.latents, rows),
            take_rows(self.states, rows),
            self.null_states,
            identity_hash({"of": self.fingerprint, "ids": ids}),
            self.mapped,
        )

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
    """Both sets as one; what is on disk stays there. The empty caption is the first's.

    Raises:
        ValueError: An id is in both, or shapes differ.
    """
    for what, one, other in (("Latents", first.latents, second.latents), ("States", first.states, second.states)):
        if one.shape[1:] != other.shape[1:]:
            raise ValueError(f"{what} of shape {tuple(one.shape[1:])} and {tuple(other.shape[1:])} cannot be one set.")
    return EncodedImages(
        joined_image_sets(first.images, second.images),
        join_rows(first.latents, second.latents),
        join_rows(first.states, second.states),
        first.null_states,
        identity_hash({"of": [first.fingerprint, second.fingerprint]}),
        first.mapped,
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
    """Latents and caption states of the images, from the store if they are there.

    Neither is ever held in memory as a whole, and an interrupted run goes on from its last finished batch.

    Args:
        image_set: The images.
        encoder: Autoencoder and text encoder; their weights are part of the identity, so the cache is never stale.
        store: Where the arrays are kept.
        batch_size: Images encoded at a time.
        progress: Called with (done, total) images: first their latents, then their captions.
        half: Keep float16, which takes half the disk.
        log: Receives a line that says how large the arrays will be before any is made.

    Captions that are longer than the text encoder reads lose their ends, as in training; how many do is logged, and
    kept in the manifest.

    Raises:
        ValueError: A value is too large for float16.
        StorageError: The store could not be written; finished batches are kept.
    """
    height, width = (int(side) for side in image_set.pixels.shape[1:3])
    encoder.text.sized((height, width))
    identity = {
        "pictures": image_set.fingerprint,
        "ids": identity_hash({"ids": list(image_set.ids)}),
        **encoder.identity(),
        **({"dtype": "float16"} if half else {}),
    }
    dtype = np.dtype(np.float16 if half else np.float32)

    def pixels(rows: slice) -> Tensor:
        return to_float(torch.from_numpy(np.array(image_set.pixels[rows])))

    def latents(rows: slice) -> Tensor:
        images = pixels(rows)
        return torch.stack([encoder.encode_pixels(images), encoder.encode_pixels(images.flip(-1))], dim=1)

    def states(rows: slice) -> Tensor:
        captions = image_set.captions[rows]
        flat = encoder.text.encode([caption for several in captions for caption in several])
        return flat.reshape(len(captions), -1, *flat.shape[1:])

    def grow(path: Path, row: tuple[int, ...], encode: Callable[[slice], Tensor]) -> None:
        with GrowingArray(path, row, dtype) as array:
            if array.finished:
                return
            while array.rows < len(image_set):
                block = encode(slice(array.rows, array.rows + batch_size)).numpy()
                if half and np.abs(block).max() > np.finfo(np.float16).max:
                    raise ValueError(
                        f"{path.name} of images from {image_set.ids[array.rows]!r} on hold {np.abs(block).max():.3g}, "
                        "which float16 does not reach: encode without half."
                    )
                array.append(block)
                if progress is not None:
                    progress(array.rows, len(image_set))
            array.finish()

    def build(folder: Path) -> Mapping[str, Any]:
        null = encoder.text.encode([""])[0]
        one = encoder.encode_pixels(pixels(slice(0, 1)))[0]
        rows = ((2, *one.shape), (len(image_set.captions[0]), *null.shape))
        size = len(image_set) * dtype.itemsize * sum(int(np.prod(row)) for row in rows)
        announce_size(log, f"latents and text states of {len(image_set):,} images", size, store.root)
        write_array(folder / NULL_STATES, tuple(null.shape), [null.numpy()])
        grow(folder / LATENTS, rows[0], latents)
        grow(folder / STATES, rows[1], states)
        captions = [caption for several in image_set.captions for caption in several]
        cut = report_cut(encoder.text, captions, "captions")
        return {"captions_cut": cut} if cut else {}

    folder = store.make("latents", identity, build)
    return EncodedImages(
        image_set,
        map_array(folder / LATENTS),
        map_array(folder / STATES),
        map_array(folder / NULL_STATES),
        identity_hash(identity),
        mapped=True,
    )


class LatentVisits(Dataset[LatentBatch]):
    """Batches for training the diffusion model: flip, caption and caption dropout are keyed by (seed, id, visit).

    Args:
        data: The training set.
        seed: Seed of these draws.
        flip_share: Probability of the mirror image.
        caption_dropout: Probability of the empty caption, for classifier-free guidance.

    Raises:
        ValueError: Captions are to be dropped, but the states of the empty caption are not known.
    """

    def __init__(self, data: EncodedImages, seed: int, flip_share: float = 0.5, caption_dropout: float = 0.1) -> None:
        if caption_dropout > 0 and bool(data.null_states.isnan().any()):
            raise ValueError(
                "caption_dropout needs the states of the empty caption, which the ready-made arrays do not hold: give "
                "null_states, or set caption_dropout to 0."
            )
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
        captions = self.data.states.shape[1]
        caption = (keyed_random.uniform(keyed_random.combine(CAPTION, keys))[:, 0] * captions).long()
        dropped = keyed_random.uniform(keyed_random.combine(DROP, keys))[:, 0] < self.caption_dropout
        states = torch.where(dropped[:, None, None], self.data.null_states, _whole(self.data.states[index, caption]))
        times = visit_times(self.seed, self.id_keys[index], visit)
        return LatentBatch(keys, times, _whole(self.data.latents[index, flip]), states)


def _whole(values: Tensor) -> Tensor:
    """Numbers that were kept in float16 as float32, in which training adds noise to them."""
    return values.float() if values.dtype == torch.float16 else values
