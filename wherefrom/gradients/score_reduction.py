"""Reduction of loss changes on a grid to scores: one for each image and, where asked for, for each part of the grid.

Shape letters: N = images, F = flips (the image, its mirror image), K = captions, T = timesteps, R = noise samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

Flip = Literal["max", "mean"]
TimestepWeights = Literal["equal", "spread"]


def reduce_losses(change: Float[Tensor, "n f k t r"], flip: Flip = "max") -> Float[Tensor, " n"]:
    """τ: the mean loss change over captions, timesteps and noise samples; the larger (or mean) of image and mirror."""
    by_flip = change.double().flatten(2).mean(dim=2)
    return by_flip.amax(dim=1) if flip == "max" else by_flip.mean(dim=1)


def weighted_median(values: Float[Tensor, "n t"], weights: Float[Tensor, " n"] | None = None) -> Float[Tensor, " t"]:
    """The (lower) median of each column, a row counting as often as its whole weight says."""
    if weights is None:
        return values.median(dim=0).values
    ordered, order = values.sort(dim=0)
    reached = weights[order].cumsum(dim=0)
    middle = (reached[-1] - 1).div(2, rounding_mode="floor")
    return ordered.gather(0, (reached <= middle).sum(dim=0, keepdim=True))[0]


def spread_weights(
    change: Float[Tensor, "n f k t r"], weights: Float[Tensor, " n"] | None = None
) -> Float[Tensor, " t"]:
    """Timestep weights of mean 1 that let none dominate: 1 / (spread of the images' changes at that timestep).

    Ours. Near t = 0 a model can hardly tell the noise from the image, so losses there are large and change by chance:
    in a plain mean they outweigh the timesteps at which images differ. The spread is the median absolute deviation
    over images and mirror images.

    Args:
        change: Changes of the losses of some images; the same images must be taken for all that is compared.
        weights: How often training sees each of them; None is once.

    Returns:
        The weights; all 1 where a timestep has no spread, as when nothing was moved.
    """
    values = change.double().mean(dim=(2, 4)).flatten(0, 1)
    counts = None if weights is None else weights.repeat_interleave(change.shape[1])
    spread = weighted_median((values - weighted_median(values, counts)).abs(), counts)
    if not bool((spread > 0).all()):
        return torch.ones(change.shape[3], dtype=torch.float64)
    return (1 / spread) / (1 / spread).mean()


@dataclass(frozen=True)
class Breakdown:
    """Which parts of a score are reported beside it.

    Attributes:
        timestep_bands: Number of bands of neighbouring timesteps, low ones (detail) to high ones (layout); 0 is none.
        captions: Whether each of an image's captions has a score.

    Raises:
        ValueError: The number of bands is negative.
    """

    timestep_bands: int = 0
    captions: bool = False

    def __post_init__(self) -> None:
        if self.timestep_bands < 0:
            raise ValueError(f"timestep_bands must not be negative; given {self.timestep_bands}.")

    def check(self, timesteps: int) -> None:
        """Refuses more bands than there are timesteps.

        Raises:
            ValueError: There are.
        """
        if self.timestep_bands > timesteps:
            raise ValueError(
                f"{self.timestep_bands} timestep_bands need at least as many timesteps; the grid has {timesteps}."
            )

    def parts(
        self, change: Float[Tensor, "n f k t r"], timesteps: Int64[Tensor, " t"], flip: Flip
    ) -> dict[str, Float[NDArray[np.float64], " n"]]:
        """Scores by part: "timesteps 0 to 200", "caption 1".

        The flip that decides an image's score decides its parts too, so the captions' scores average to the score,
        and so do the bands' scores, each weighted by its number of timesteps.
        """
        means = change.double().mean(dim=4)
        if flip == "max":
            kept = means[torch.arange(len(means)), means.flatten(2).mean(dim=2).argmax(dim=1)]
        else:
            kept = means.mean(dim=1)
        result = {}
        if self.timestep_bands:
            for band in np.array_split(np.arange(len(timesteps)), self.timestep_bands):
                name = f"timesteps {int(timesteps[band[0]])} to {int(timesteps[band[-1]])}"
                result[name] = kept[:, :, band].flatten(1).mean(dim=1).numpy()
        if self.captions:
            for index in range(kept.shape[1]):
                result[f"caption {index + 1}"] = kept[:, index].mean(dim=1).numpy()
        return result
