"""Base of the methods that precondition a query's gradient by the curvature of the training loss.

Attribution by unlearning takes a finite step along F⁻¹ ∇L(ẑ) and measures the training losses again; influence
functions are its first-order approximation.

Shape letters: N = images, F = flips (the image, its mirror image), K = captions, T = timesteps, R = noise samples,
Q = queries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.attributors.base import Attributor, Need
from wherefrom.curvature import Curvature, CurvatureMatrix, FitContext
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.gradients.query_loss import QueryLatent, encode_query
from wherefrom.gradients.score_reduction import Breakdown, Flip, TimestepWeights, reduce_losses, spread_weights
from wherefrom.metrics.reliability import split_half
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset, select_weights
from wherefrom.queries.types import Query, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.ranges import check_ranges
from wherefrom.runtime.stable_names import settings_identity

_REFERENCE = 256  # training images over which the spread of each timestep's loss changes is estimated


class PreconditionedAttributor(Attributor):
    """Base of the methods that precondition the query's gradient ∇L(ẑ) by F⁻¹, F a curvature of the training loss.

    A subclass measures a change of the loss of every training image on a grid, of shape (N, F, K, T, R); the score is
    its mean over captions, timesteps (weighted) and noise samples, then the maximum or mean over flips.

    Args:
        weights: Parameters that are differentiated.
        curvature: Estimator of F.
        grid: Timesteps and noise samples at which training losses are measured.
        flip: How the scores of an image and of its mirror image are combined.
        batch_size: Forward passes at a time; does not change the result.
        breakdown: Which parts of the scores (timestep bands, captions) are reported beside them.
        timestep_weights: `equal` takes the plain mean over timesteps, as the papers do; `spread` (ours) divides each
            timestep's changes by their spread (median absolute deviation) over 256 training images, so that no timestep
            dominates the others.

    Attributes:
        curvature_matrix: F, as fitted or loaded by `fit`.

    Raises:
        ValueError: The curvature is not an object, the timesteps' weights are unknown, or there are more timestep bands
            than timesteps.
    """

    requires: frozenset[Need] = frozenset({"model", "gradients", "prompt"})
    takes_regions = True
    scores_loss_changes = True
    curvature_matrix: CurvatureMatrix

    def __init__(
        self,
        weights: Subset,
        *,
        curvature: Curvature,
        grid: LossGrid,
        flip: Flip,
        batch_size: int,
        breakdown: Breakdown,
        timestep_weights: TimestepWeights,
    ) -> None:
        if not isinstance(curvature, Curvature):
            raise ValueError(f"curvature must be DiagonalFisher(), EKFAC() or Identity(); given {curvature!r}.")
        if timestep_weights not in ("equal", "spread"):
            raise ValueError(f"Unknown timestep_weights {timestep_weights!r}; choose 'equal' or 'spread'.")
        check_ranges(batch_size=batch_size)
        breakdown.check(grid.timesteps)
        self.weights: Subset = weights
        self.curvature, self.grid, self.flip = curvature, grid, flip
        self.batch_size, self.breakdown = batch_size, breakdown
        self.timestep_weights: TimestepWeights = timestep_weights
        self._ready: tuple[DiffusionModel, EncodedImages, EncodedImages | None, Store, Runner] | None = None
        self._shared: CurvatureMatrix | None = None
        self._shared_from: str | None = None

    def share_curvature(
        self, model: DiffusionModel, data: TrainingData, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Fits the curvature on this model and data, and uses it for every model that `fit` is later given.

        Used for models customized from one base model, which share its curvature (AbU, section 5.2).

        Raises:
            ValueError: There are no latents, or the curvature cannot be fitted.
        """
        if data.latents is None:
            raise ValueError(f"{type(self).__name__} fits its curvature over latents; there are none.")
        log("curvature of the base model, for all models")
        self._shared = self._fit_curvature(model, data.latents, store, runner, log)
        self._shared_from = f"{model.fingerprint()} over {data.latents.weighted_fingerprint}"

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {
            "weights": self.weights,
            "grid": settings_identity(self.grid),
            "flip": self.flip,
            **self.curvature.identity(),
            **({} if self._shared_from is None else {"curvature_from": self._shared_from}),
            "breakdown": settings_identity(self.breakdown),
            "timestep_weights": self.timestep_weights,
        }

    def prepare(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log
    ) -> tuple[DiffusionModel, EncodedImages]:
        """Stores model, latents and runner for `score`, and fits or loads the curvature.

        Raises:
            ValueError: There is no model, or no latents; or the curvature cannot be fitted, or was
                fitted for another model.
        """
        if model is None or data.latents is None:
            raise ValueError(f"{type(self).__name__} needs a model and the latents of its training images.")
        data.latents.check(model)
        self._ready = (model, data.latents, data.held_out_latents, store, runner)
        started = time.monotonic()
        self.curvature_matrix = self._fit_curvature(model, data.latents, store, runner, log)
        self.fit_s = {"curvature": time.monotonic() - started}
        return model, data.latents

    def _fit_curvature(
        self, model: DiffusionModel, data: EncodedImages, store: Store, runner: Runner, log: Log
    ) -> CurvatureMatrix:
        if self._shared is not None:
            return self._shared
        names = list(select_weights(model.denoiser, self.weights))
        return self.curvature.matrix(FitContext(model, data, names, store, runner, self.progress, log))

    def ready(self) -> tuple[DiffusionModel, EncodedImages, EncodedImages | None, Store, Runner]:
        """What `prepare` stored: model, training latents, held-out latents, store and runner.

        Raises:
            ValueError: `fit` has not run.
        """
        if self._ready is None:
            raise ValueError("fit must run before score.")
        return self._ready

    def grid_passes(self, data: TrainingData) -> int:
        """Forward passes of one measurement of all training and held-out images on the grid: N · F · K · T · R."""
        assert data.latents is not None
        held_out = 0 if data.held_out_latents is None else len(data.held_out_latents)
        flips = 2 if self.grid.flips else 1
        images = len(data.latents) + held_out
        return images * flips * data.latents.captions_per_image * self.grid.timesteps * self.grid.noise_samples

    def curvature_passes(self, data: TrainingData) -> int:
        """Forward passes to fit the curvature (a backward pass counts as two); 0 where it is shared."""
        assert data.latents is not None
        return 0 if self._shared is not None else self.curvature.passes(data.latents)

    def query_latent(self, query: Query) -> QueryLatent:
        """The query encoded by the model; see `encode_query`."""
        return encode_query(self.ready()[0], query)

    def reference_changes(
        self, change: Float[Tensor, "n f k t r *q"], chosen: Sequence[int], measure: Callable[[list[int]], Tensor]
    ) -> Float[Tensor, "m f k t r *q"]:
        """Loss changes of the reference images, over which the spread of each timestep is estimated.

        These are a fixed sample of up to 256 training images, so that the timestep weights do not depend on the
        candidates. Nothing is measured where they are among the candidates, or where the weights are `equal`.

        Args:
            change: The candidates' loss changes.
            chosen: The candidates' positions in the training set.
            measure: Computes the loss changes of the training images at the given positions.
        """
        if self.timestep_weights == "equal":
            return change[:0]
        wanted, row_of = self.ready()[1].sample(_REFERENCE), {position: row for row, position in enumerate(chosen)}
        if all(position in row_of for position in wanted):
            return change[[row_of[position] for position in wanted]]
        return measure(wanted)

    def timestep_factors(self, reference: Float[Tensor, "m f k t r"]) -> Float[Tensor, "t 1"]:
        """Factor of each timestep's loss changes in a score, of mean 1, for broadcasting over (..., T, R)."""
        if self.timestep_weights == "equal":
            return torch.ones(reference.shape[3], 1, dtype=reference.dtype)
        data = self.ready()[1]
        weights = None if data.weights is None else data.weights[data.sample(_REFERENCE)]
        return spread_weights(reference, weights).to(reference.dtype)[:, None]

    def parts(self, change: Float[Tensor, "n f k t r"]) -> dict[str, Float[NDArray[np.float64], " n"]]:
        """Scores by timestep band and caption; see `Breakdown`."""
        return self.breakdown.parts(change, self.grid.steps(self.ready()[0].noise_schedule.steps), self.flip)

    def reliability(self, change: Float[Tensor, "n f k t r"]) -> float:
        """Split-half reliability of the scores (of one copy) over the (t, ε) samples; NaN with a single sample."""
        noise_samples = change.double().mean(dim=2).flatten(2)

        def score(part: Int64[NDArray[np.int64], " h"]) -> Float[NDArray[np.float64], " n"]:
            return reduce_losses(noise_samples[:, :, None, torch.from_numpy(part), None], self.flip).numpy()

        return split_half(score, noise_samples.shape[2], self.grid.seed)
