"""Losses of many images on a fixed grid of timesteps, with noise keyed by what it belongs to (common random numbers).

Shape letters: N = images, F = flips (the image, its mirror image), K = captions, T = timesteps, R = noise samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Progress
from wherefrom.runtime.dataset_pass import run_pass
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.ranges import check_ranges
from wherefrom.runtime.salts import Salt
from wherefrom.runtime.stable_names import settings_identity


@dataclass(frozen=True)
class LossGrid:
    """Where losses are measured.

    Attributes:
        timesteps: Number of timesteps, spaced evenly from 0: with T = 1000, 20 of them are 0, 50, …, 950 (AbU,
            appendix B).
        noise_samples: Noise samples at each timestep.
        seed: Seed of the noise.
        flips: Also measure the mirror images.
        offset: Where the first timestep lies, as a share of the distance between two. 0 is the papers' grid; with 0.5 a
            few timesteps stand for the whole schedule as the midpoint rule does, and t = 0, where the loss cannot be
            learned, is not among them.

    Raises:
        ValueError: `offset` does not lie in [0, 1).
    """

    timesteps: int = 20
    noise_samples: int = 1
    seed: int = 0
    flips: bool = True
    offset: float = 0.0

    def __post_init__(self) -> None:
        check_ranges(timesteps=self.timesteps, noise_samples=self.noise_samples, seed=self.seed)
        if not 0 <= self.offset < 1:
            raise ValueError(f"offset must be at least 0 and less than 1; given {self.offset}.")

    def steps(self, total: int) -> Int64[Tensor, " t"]:
        """The timesteps themselves.

        Raises:
            ValueError: There are not that many.
        """
        if not 1 <= self.timesteps <= total:
            raise ValueError(
                f"timesteps must lie between 1 and {total}, the length of the model's schedule; given {self.timesteps}."
            )
        return ((torch.arange(self.timesteps).double() + self.offset) * total / self.timesteps).long()

    def per_flip(self, captions: int) -> int:
        """Losses of an image, and again of its mirror image."""
        return captions * self.timesteps * self.noise_samples

    def of(self, model: DiffusionModel, data: EncodedImages, batch_size: int) -> LossPass:
        """The losses of a data set on this grid, still to be measured."""
        return LossPass(model, data, self, batch_size)


@dataclass(frozen=True)
class LossSamples:
    """Timesteps and noise that each image samples for itself, instead of a grid for all (JourneyTRAK's training side).

    Attributes:
        noise_samples: Samples of a timestep, with replacement, and of noise; all with one caption of the image's,
            sampled too.
        seed: Seed of these.
        flips: Also measure the mirror images.

    Raises:
        ValueError: `noise_samples` is not positive.
    """

    noise_samples: int = 10
    seed: int = 0
    flips: bool = True

    def __post_init__(self) -> None:
        check_ranges(noise_samples=self.noise_samples, seed=self.seed)

    def per_flip(self, captions: int) -> int:
        """Losses of an image, and again of its mirror image."""
        return self.noise_samples

    def of(self, model: DiffusionModel, data: EncodedImages, batch_size: int) -> DrawnLosses:
        """The losses of a data set at its own samples, still to be measured."""
        return DrawnLosses(model, data, self, batch_size)


class LossPass:
    """Losses of every image, flip, caption, timestep and noise sample (a `TrainingPass`).

    `losses` has the shape (N, F, K, T, R), NaN where not yet measured. An *item* of the grid is one combination of
    (flip, caption, timestep, noise sample), numbered as in the flattened (F, K, T, R).

    Args:
        model: The model, with whatever weights it has now.
        data: The images.
        grid: Where the losses are measured.
        batch_size: Forward passes at a time.

    Raises:
        ValueError: A loss is not finite.
    """

    def __init__(self, model: DiffusionModel, data: EncodedImages, grid: LossGrid, batch_size: int) -> None:
        self.model, self.data, self.batch_size = model, data, batch_size
        self.id_keys = data.id_keys
        steps = grid.steps(model.noise_schedule.steps)
        shape = (2 if grid.flips else 1, self.captions_measured(), len(steps), grid.noise_samples)
        flip, caption, step, draw = (
            part.flatten() for part in torch.meshgrid(*map(torch.arange, shape), indexing="ij")
        )
        self.shape, self.flip, self.caption, self.timestep = shape, flip, caption, steps[step]
        self.item_keys = keyed_random.combine(Salt.GRID_NOISE, grid.seed, flip, caption, self.timestep, draw)
        self.losses = torch.full((len(data), *shape), float("nan"), dtype=model.dtype)

    @torch.no_grad()
    def step(self, positions: range) -> None:
        """Measures the images at these positions."""
        extra = self.losses.shape[1 + len(self.shape) :]
        losses = torch.full((len(positions), len(self.flip), *extra), float("nan"), dtype=self.losses.dtype)
        for image, item in self.batches(positions):
            losses[image - positions.start, item] = self._measure(image, item)
        losses = losses.reshape(len(positions), *self.losses.shape[1:])
        self.check_finite("loss", positions, losses, "the model's weights and the unlearning step")
        self.losses[positions.start : positions.stop] = losses

    def batches(self, positions: range) -> Iterator[tuple[Int64[Tensor, " b"], Int64[Tensor, " b"]]]:
        """All (image, item of the grid) pairs of these images, some at a time, whose latents have one shape."""
        items = len(self.flip)
        for members in self.data.by_shape(positions):
            for start in range(0, len(members) * items, self.batch_size):
                flat = torch.arange(start, min(start + self.batch_size, len(members) * items))
                yield members[flat // items], flat % items

    def captions_measured(self) -> int:
        """Number of captions with which an image's loss is measured."""
        return self.data.captions_per_image

    def check_finite(self, what: str, positions: range, values: Float[Tensor, "b ..."], suspects: str) -> None:
        """Raises for values that are not finite.

        Raises:
            ValueError: A value is not finite; the message names the first such image.
        """
        if not torch.isfinite(values).all():
            worst = positions.start + int((~torch.isfinite(values)).flatten(1).any(dim=1).nonzero()[0])
            raise ValueError(f"The {what} of image {self.data.ids[worst]!r} is not finite: check {suspects}.")

    def _measure(self, image: Tensor, item: Tensor) -> Tensor:
        return self.item_losses(image, item).cpu()

    def item_losses(self, image: Int64[Tensor, " b"], item: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The loss of each (image, item of the grid) pair."""
        model, device = self.model, self.model.device
        caption, timestep, keys = self.noise_samples(image, item)
        latents = self.data.latents_at(image, self.flip[item]).to(device, model.dtype)
        conditioning = self.data.conditioning_at(image, caption).to(device, model.dtype)
        noise = keyed_random.normal(keys.to(device), latents.shape[1:], model.dtype)
        return model.losses(latents, conditioning, timestep.to(device), noise)

    def noise_samples(
        self, image: Int64[Tensor, " b"], item: Int64[Tensor, " b"]
    ) -> tuple[Int64[Tensor, " b"], Int64[Tensor, " b"], Int64[Tensor, " b"]]:
        """Caption, timestep and noise key of each pair."""
        return (
            self.caption[item],
            self.timestep[item],
            keyed_random.combine(self.id_keys[image], self.item_keys[item]),
        )

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Adds rows measured elsewhere."""
        self.losses[state["rows"]] = state["losses"].to(self.losses.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """The rows measured so far."""
        rows = torch.isfinite(self.losses).flatten(1).all(dim=1).nonzero()[:, 0]
        return {"rows": rows, "losses": self.losses[rows]}


class DrawnLosses(LossPass):
    """Losses of every image, flip and sample, at timesteps keyed by (seed, image's id, flip, sample).

    Args:
        model: The model.
        data: The images.
        settings: How to sample.
        batch_size: Forward passes at a time.
    """

    def __init__(self, model: DiffusionModel, data: EncodedImages, settings: LossSamples, batch_size: int) -> None:
        super().__init__(model, data, LossGrid(1, settings.noise_samples, settings.seed, settings.flips), batch_size)
        self.item_keys = keyed_random.combine(Salt.SAMPLED_LOSS_NOISE, self.item_keys)
        chosen = keyed_random.uniform(keyed_random.combine(Salt.SAMPLED_LOSS_CAPTION, settings.seed, self.id_keys))[
            :, 0
        ]
        self.caption_of = (chosen * data.captions_per_image).long()

    def captions_measured(self) -> int:
        """One: a grid of one caption and timestep has as many items as there are draws."""
        return 1

    def noise_samples(
        self, image: Int64[Tensor, " b"], item: Int64[Tensor, " b"]
    ) -> tuple[Int64[Tensor, " b"], Int64[Tensor, " b"], Int64[Tensor, " b"]]:
        """Caption, timestep and noise key of each pair."""
        keys = keyed_random.combine(self.id_keys[image], self.item_keys[item])
        timestep = (
            keyed_random.uniform(keyed_random.combine(Salt.SAMPLED_LOSS_TIMESTEP, keys))[:, 0]
            * self.model.noise_schedule.steps
        ).long()
        return self.caption_of[image], timestep, keys


def measure_losses(
    model: DiffusionModel,
    *,
    data: EncodedImages,
    grid: LossGrid,
    store: Store,
    runner: Runner,
    batch_size: int = 256,
    weights: str | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "n f k t r"]:
    """Losses of all images, cached in the store.

    Args:
        model: The model with the weights to measure.
        data: The images.
        grid: Where to measure.
        store: Where the losses are kept.
        runner: Rank and world size of this process.
        batch_size: Forward passes at a time.
        weights: Names the weights when they are not the model's own (a hash of the moved tensors); default: hash of
            the model.
        progress: Called with (done, total) chunks.

    Raises:
        ValueError: A loss is not finite.
        StorageError: The store could not be written.
    """
    identity: dict[str, Any] = {
        "model": weights if weights is not None else model.fingerprint(),
        "data": data.fingerprint,
        "dtype": str(model.dtype),
        **settings_identity(grid),
    }
    work = run_pass(
        lambda: LossPass(model, data, grid, batch_size),
        count=len(data),
        store=store,
        kind="losses",
        identity=identity,
        runner=runner,
        progress=progress,
    )
    assert isinstance(work, LossPass)
    return work.losses
