"""JourneyTRAK (Georgiev et al. 2023, "The Journey, Not the Destination"): TRAK along a sampling trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.attributors.base import Need
from wherefrom.attributors.trak.base import ProjectedGradients
from wherefrom.gradients.loss_grid import LossSamples
from wherefrom.gradients.projection import Projection
from wherefrom.gradients.query_loss import QueryLatent, QueryLoss, encode_query
from wherefrom.gradients.score_reduction import Flip
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset
from wherefrom.models.sampling import Trajectory
from wherefrom.queries.types import Query
from wherefrom.runtime import keyed_random
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.ranges import check_ranges
from wherefrom.runtime.salts import Salt


class JourneyLoss(QueryLoss):
    """Loss of the query at step t of its sampling trajectory: x̂₀(t), the sampler's prediction, with fresh noise at t.

    The noise is keyed by (seed, query id, t, draw index), so that a step's gradient does not depend on which other
    steps are computed.

    Args:
        model: The model.
        query: The query.
        trajectory: The sampler's predictions of x̂₀ along the query's trajectory.
        seed: Seed of the noise.
        runner: Rank and world size of this process; processes share a step's noise samples.
        batch_size: Noise samples at a time.
    """

    def __init__(
        self,
        model: DiffusionModel,
        *,
        query: QueryLatent,
        trajectory: Trajectory,
        seed: int,
        runner: Runner,
        batch_size: int = 128,
    ) -> None:
        super().__init__(model, query, seed, runner, batch_size)
        self.trajectory = trajectory

    def at(self, salt: int, step: int, draw: Int64[Tensor, " b"]) -> tuple[Tensor, Tensor, Tensor]:
        """x̂₀ of timestep `step`, the timestep itself and the noise keys of some noise samples."""
        predicted = self.trajectory.predicted[self.trajectory.timesteps.index(step)]
        keys = keyed_random.combine(Salt.JOURNEY_NOISE, salt, self.seed, self.query.key, step, draw)
        return predicted, draw.new_full(draw.shape, step), keys


class JourneyTRAK(ProjectedGradients):
    """JourneyTRAK (Georgiev et al. 2023): Σ_t φ_t(ẑ)ᵀ (ΦᵀΦ + λI)⁻¹ φ(z).

    φ_t(ẑ) is the projected gradient of the loss of x̂₀(t), predicted at step t of the query's sampling trajectory. The
    paper scores each step separately (`step_scores`); the score here is the sum over `timesteps`. The trajectory is
    that of the model which generated the query; all models of an ensemble score it. φ(z) is averaged over timesteps
    that each training image samples with replacement, with one of its captions.

    Args:
        weights: Parameters whose gradients are projected; the paper takes all.
        projection: P, the random projection.
        grid: (t, ε) samples over which a training image's gradient is averaged.
        timesteps: Which steps of the trajectory count; each must be one that the sampler stopped at. Null takes `steps`
            of them.
        steps: Where `timesteps` is null, the number of steps, spaced evenly over the trajectory from its first to its
            last, or all of a shorter one. Time and memory of a query grow with it.
        resamplings: Number of noise samples over which each step's gradient is averaged.
        relative_lambda: λ relative to the mean diagonal of ΦᵀΦ, whose rows are the images without mirror images.
        absolute_lambda: λ itself, instead.
        flip: How the scores of an image and of its mirror image are combined; of the sum over steps.
        ensemble: Pipelines of further models, trained on the same images with the same autoencoder; scores are
            averaged over all models.
        batch_size: Samples at a time; does not change the result.
        seed: Seed of the query's noise.

    Raises:
        ValueError: λ is not positive, both or neither are given, the projection is too small, a timestep occurs twice,
            or a number is not positive.
    """

    requires: frozenset[Need] = frozenset({"model", "gradients", "prompt", "trajectory"})
    method = "JourneyTRAK"

    def __init__(
        self,
        weights: Subset = "all",
        *,
        projection: Projection = Projection(),
        grid: LossSamples = LossSamples(),
        timesteps: list[int] | None = None,
        steps: int = 10,
        resamplings: int = 20,
        relative_lambda: float | None = 0.01,
        absolute_lambda: float | None = None,
        flip: Flip = "max",
        ensemble: list[str] | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        check_ranges(steps=steps, resamplings=resamplings)
        if timesteps is not None and (not timesteps or len(set(timesteps)) < len(timesteps)):
            raise ValueError(f"timesteps must be different ones, or null to take {steps}; given {timesteps}.")
        super().__init__(
            weights,
            projection=projection,
            grid=grid,
            noise_samples=resamplings,
            relative_lambda=relative_lambda,
            absolute_lambda=absolute_lambda,
            flip=flip,
            ensemble=ensemble,
            batch_size=batch_size,
            seed=seed,
        )
        self.timesteps, self.steps = timesteps, steps

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        chosen = {"steps": self.steps} if self.timesteps is None else {"timesteps": self.timesteps}
        return {**super().identity(), **chosen}

    def max_query_steps(self) -> int:
        """Largest number of steps of a query."""
        return self.steps if self.timesteps is None else len(self.timesteps)

    def check(self, queries: Sequence[Query]) -> None:
        """Raises for queries that the method cannot attribute, before any long computation.

        Raises:
            ValueError: A query has no trajectory, or one without a timestep asked for.
        """
        super().check(queries)
        for query in queries:
            self.query_steps(query)

    def query_steps(self, query: Query) -> Sequence[int]:
        """Timesteps of the trajectory that are scored.

        Raises:
            ValueError: The query has no trajectory, or one without a timestep asked for.
        """
        sampled = self._trajectory(query).timesteps
        if self.timesteps is None:
            count = min(self.steps, len(sampled))
            return [sampled[round(place)] for place in np.linspace(0, len(sampled) - 1, count)]
        missing = [timestep for timestep in self.timesteps if timestep not in sampled]
        if missing:
            raise ValueError(
                f"Query {query.id!r} was not sampled at timestep {missing[0]}: choose timesteps from "
                f"{', '.join(map(str, sampled))}, or another number of queries.sampling_steps."
            )
        return self.timesteps

    def query_loss(self, model: DiffusionModel, query: Query, runner: Runner) -> QueryLoss:
        """The loss along the query's trajectory; see `JourneyLoss`."""
        # A step has few noise samples: in one batch they would leave the other processes idle.
        each = -(-self.noise_samples // runner.world_size)
        latent, trajectory = encode_query(model, query), self._trajectory(query)
        return JourneyLoss(
            model, query=latent, trajectory=trajectory, seed=self.seed, runner=runner, batch_size=min(128, each)
        )

    def step_scores(self, query: Query) -> tuple[Sequence[int], Float[NDArray[np.float64], "s n"]]:
        """The S timesteps, and the scores of all training images (with all copies) at each step separately.

        Raises:
            ValueError: `fit` has not run, or the query has no such trajectory.
        """
        (directions,) = self.directions([query])
        assert self._ready is not None
        scores, weights = self.products(self.features, directions), self._ready[0].images.weights
        return self.query_steps(query), scores if weights is None else scores * weights

    def _trajectory(self, query: Query) -> Trajectory:
        if query.trajectory is None:
            raise ValueError(
                f"Query {query.id!r} has no sampling trajectory, which JourneyTRAK follows, and an image file never "
                "has one: draw the query from its prompt (queries.prompts; from Python, generate with "
                "keep_trajectory=True), or choose TRAK."
            )
        return query.trajectory
