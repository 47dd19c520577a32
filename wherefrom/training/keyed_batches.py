"""The order of training, keyed: which image comes when is a hash of (seed, epoch, id, copy).

Leaving images out therefore removes them from the stream and changes nothing else: the others keep their relative
order, and, since noise, timestep, flip and caption are keyed by (seed, id, visit), they keep those too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from wherefrom.models.conditioning import Conditioning
from wherefrom.models.pixels import to_float
from wherefrom.runtime import keyed_random
from wherefrom.runtime.salts import Salt

# Salts that keep the draws of one (seed, id, visit) independent of each other.
ORDER, FLIP, TIMESTEP = Salt.TRAINING_ORDER, Salt.TRAINING_FLIP, Salt.TRAINING_TIMESTEP
CAPTION, DROP, NOISE = Salt.TRAINING_CAPTION, Salt.TRAINING_CAPTION_DROPOUT, Salt.TRAINING_NOISE


class Visit(NamedTuple):
    """The `visit`-th time that training meets the image at `position`."""

    position: int
    visit: int


class KeyedBatches(Sampler[list[Visit]]):
    """An endless keyed stream of visits, cut into batches and shared between ranks.

    Args:
        id_keys: Hash of each image's id (`keyed.hash_texts`).
        seed: Seed of the order.
        batch_size: Visits in a batch over all ranks.
        steps: Length of the stream in batches.
        start_step: First batch to yield; a resumed run goes on from here.
        rank: This process.
        world_size: Number of processes; must divide `batch_size`, so that averaged gradients are those of one process.
        repeats: How often an epoch visits each image (`ImageSet.weights`), whole numbers; None is once.

    Raises:
        ValueError: `batch_size` is not a multiple of `world_size`, there are no images, or one is not visited.
    """

    def __init__(
        self,
        id_keys: Int64[Tensor, " n"],
        *,
        seed: int,
        batch_size: int,
        steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeats: Sequence[float] | NDArray[np.float64] | None = None,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} is not a multiple of the {world_size} processes.")
        if len(id_keys) == 0:
            raise ValueError("The training set is empty; loosen the filters or the list of excluded ids.")
        counts = torch.ones_like(id_keys) if repeats is None else torch.as_tensor(repeats).long()
        if len(counts) != len(id_keys) or int(counts.min()) < 1:
            raise ValueError(f"An epoch visits each of the {len(id_keys)} images at least once; given {repeats}.")
        self.counts = counts
        # Which image, and which of its copies, each visit of an epoch is.
        self.positions = torch.arange(len(id_keys)).repeat_interleave(counts)
        self.copies = torch.arange(len(self.positions)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        self.id_keys, self.seed, self.batch_size, self.steps = id_keys, seed, batch_size, steps
        self.start_step, self.rank, self.world_size = start_step, rank, world_size

    def __len__(self) -> int:
        return self.steps

    def order(self, epoch: int) -> list[int]:
        """The order of this epoch's visits: positions of the images, or of `positions` where there are repeats."""
        keys = keyed_random.combine(ORDER, self.seed, epoch, self.id_keys)[self.positions]
        again = self.copies > 0  # the first visit keeps the key that it has in a set without repeats
        keys[again] = keyed_random.combine(keys[again], self.copies[again])
        return torch.argsort(keys, stable=True).tolist()

    def visit(self, row: int, epoch: int) -> Visit:
        """The visit of this row of an epoch: the visits of an image are numbered through all epochs."""
        position = int(self.positions[row])
        return Visit(position, epoch * int(self.counts[position]) + int(self.copies[row]))

    def __iter__(self) -> Iterator[list[Visit]]:
        size = len(self.positions)
        first = self.start_step * self.batch_size
        epoch, order = first // size, self.order(first // size)
        for step in range(self.start_step, self.steps):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // size != epoch:
                    epoch = position // size
                    order = self.order(epoch)
                batch.append(self.visit(order[position % size], epoch))
            yield batch[self.rank :: self.world_size]


class PixelBatch(NamedTuple):
    """Images in [-1, 1] with the key of each visit."""

    keys: Int64[Tensor, " b"]
    pixels: Float[Tensor, "b 3 h w"]


class LatentBatch(NamedTuple):
    """What the latent diffusion trains on: the key of each visit, its time in [0, 1), latents and conditioning."""

    keys: Int64[Tensor, " b"]
    times: Float[Tensor, " b"]
    latents: Float[Tensor, "b c h w"]
    conditioning: Conditioning


def visit_keys(seed: int, id_keys: Int64[Tensor, " b"], visits: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
    """One key for each (seed, id, visit)."""
    return keyed_random.combine(seed, id_keys, visits)


def flips(keys: Int64[Tensor, " b"], share: float) -> Bool[Tensor, " b"]:
    """Which visits see the mirror image."""
    return keyed_random.uniform(keyed_random.combine(FLIP, keys))[:, 0] < share


def visit_times(seed: int, id_keys: Int64[Tensor, " b"], visits: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The time in [0, 1) of each visit: a keyed start for each image, then golden-ratio steps.

    Successive visits of an image are spread evenly over the timesteps, which is less noisy than independent draws and
    keyed just as well.
    """
    start = keyed_random.uniform(keyed_random.combine(TIMESTEP, seed, id_keys))[:, 0]
    return torch.remainder(start.double() + visits.double() * 0.6180339887498949, 1.0)


class VisitDataset(Protocol):
    """A data set that is asked for whole batches of visits."""

    def __getitems__(self, visits: list[Visit]) -> tuple[Any, ...]:
        """The batch of these visits, whose first field is their keys."""
        ...


class PixelVisits(Dataset[PixelBatch]):
    """Images for training the autoencoder, mirrored at random.

    Args:
        pixels: uint8 RGB images.
        id_keys: Hash of each image's id.
        seed: Seed of flips and noise.
        flip_share: Probability of the mirror image.
    """

    def __init__(
        self, pixels: UInt8[Tensor, "n h w 3"], id_keys: Int64[Tensor, " n"], seed: int, flip_share: float = 0.5
    ) -> None:
        self.pixels, self.id_keys, self.seed, self.flip_share = pixels, id_keys, seed, flip_share

    def __len__(self) -> int:
        return len(self.id_keys)

    def __getitems__(self, visits: list[Visit]) -> PixelBatch:
        """The batch of these visits."""
        index, visit = (torch.tensor(column) for column in zip(*visits, strict=True))
        keys = visit_keys(self.seed, self.id_keys[index], visit)
        pixels = to_float(self.pixels[index])
        flip = flips(keys, self.flip_share)
        return PixelBatch(keys, torch.where(flip[:, None, None, None], pixels.flip(-1), pixels))
