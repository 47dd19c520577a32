"""Influence functions: the first-order change of the training losses when the query is unlearned."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wherefrom.attributors.compute_estimate import ComputeEstimate
from wherefrom.attributors.influence.directional_derivatives import measure_derivatives
from wherefrom.attributors.preconditioned import PreconditionedAttributor
from wherefrom.curvature import EKFAC, Curvature
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.gradients.query_loss import QueryLoss
from wherefrom.gradients.score_reduction import Breakdown, Flip, TimestepWeights, reduce_losses
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset, select_weights, trainable
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.ranges import check_ranges


class InfluenceFunction(PreconditionedAttributor):
    """Influence functions (Koh and Liang 2017) for diffusion models: ∇L(ẑ)ᵀ F⁻¹ ∇L(z) / N.

    ẑ is the query, z a training image, L the mean diffusion loss over timesteps and noise, F the curvature (EK-FAC by
    default) and N the number of training images. It is the limit for α → 0 of τ / α, the score of attribution by
    unlearning with step size α (AbU, appendix A.3).

    The score of an image that training sees wᵢ times is wᵢ ∇L(ẑ)ᵀ F⁻¹ ∇L(zᵢ) / N with N = Σ wᵢ: the effect of removing
    all its copies, to first order; `per_copy` holds that of one, which is the limit above and compares with the null.

    Nothing is stored of the training gradients: each block of `queries_per_pass` queries costs one pass over the
    training set, in which ∇l(z)ᵀ v is computed for the directions v = F⁻¹ ∇L(ẑ) / N. `InfluenceBank` stores them.

    Args:
        weights: Parameters that are differentiated.
        noise_samples: Number of (t, ε) samples over which the query's gradient is averaged.
        grid: Timesteps and noise samples at which training losses are differentiated.
        flip: How the scores of an image and of its mirror image are combined.
        curvature: Estimator of F: `EKFAC`, `DiagonalFisher`, or `Identity` (plain gradient similarity).
        queries_per_pass: Queries served by one pass over the training set; more take more memory.
        batch_size: Samples at a time; does not change the result.
        seed: Seed of the query's noise samples.
        breakdown: Which parts of the scores (timestep bands, captions) are reported beside them.
        timestep_weights: `equal` takes the plain mean over timesteps, as the papers do; `spread` (ours) divides each
            timestep's derivatives by their spread (median absolute deviation) over 256 training images, so that no
            timestep dominates the others.

    Raises:
        ValueError: The timesteps' weights are unknown, a number is not positive, or there are more timestep bands than
            timesteps.
    """

    def __init__(
        self,
        weights: Subset = "cross_attention_kv",
        *,
        noise_samples: int = 2000,
        grid: LossGrid = LossGrid(),
        flip: Flip = "max",
        curvature: Curvature = EKFAC(),
        queries_per_pass: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        breakdown: Breakdown = Breakdown(),
        timestep_weights: TimestepWeights = "spread",
    ) -> None:
        super().__init__(
            weights,
            curvature=curvature,
            grid=grid,
            flip=flip,
            batch_size=batch_size,
            breakdown=breakdown,
            timestep_weights=timestep_weights,
        )
        check_ranges(noise_samples=noise_samples, queries_per_pass=queries_per_pass, seed=seed)
        self.noise_samples, self.queries_per_pass, self.seed = noise_samples, queries_per_pass, seed

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {"method": "influence function", "draws": self.noise_samples, "seed": self.seed, **super().identity()}

    def estimate(self, data: TrainingData, queries: int) -> ComputeEstimate:
        """Three forward passes for each sample of the curvature, of the queries' gradients and of the training grid."""
        assert data.latents is not None
        losses = self.grid_passes(data)
        passes = -(-queries // self.queries_per_pass)
        latents = data.latents.held_bytes
        block = min(queries, self.queries_per_pass)
        once = self.curvature_passes(data) + 3 * losses * passes
        return ComputeEstimate(once, 3 * self.noise_samples, 4 * losses * queries, latents + 8 * losses * block)

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Fits the curvature, once per model."""
        self.prepare(data, model, store, runner, log)

    def directions(self, queries: Sequence[Query]) -> dict[str, Tensor]:
        """F⁻¹ ∇L(ẑ) / N of each query, by parameter name: shape (Q, *parameter)."""
        model, data, _, _, runner = self.ready()
        parameters = select_weights(model.denoiser, self.weights)
        rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
        for query in queries:
            with trainable(model.denoiser, parameters):
                loss = QueryLoss(model, self.query_latent(query), self.seed, runner)
                gradients = loss.gradient(parameters, 0, self.noise_samples)
            for name, step in self.curvature_matrix.precondition(gradients).items():
                rows[name].append(step.detach() / data.seen)
        return {name: torch.stack(steps) for name, steps in rows.items()}

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """A block of queries at a time: their gradients, then one pass over the training set."""
        _, data, held_out, _, _ = self.ready()
        chosen = self.positions(data.ids, candidates)
        part = data if candidates is None else data.subset(chosen)
        for start in range(0, len(queries), self.queries_per_pass):
            block = queries[start : start + self.queries_per_pass]
            started = time.monotonic()
            directions = self.directions(block)
            gradient_s = time.monotonic() - started
            change = self._derivatives(part, directions)
            null = self._derivatives(held_out, directions) if held_out is not None else None
            reference = self.reference_changes(
                change, chosen, partial(self._reference_derivatives, directions=directions)
            )
            pass_s = time.monotonic() - started - gradient_s
            for index, query in enumerate(block):
                query_change = change[..., index]
                weights = self.timestep_factors(reference[..., index])
                query_change = query_change * weights
                of_copies = Scores(
                    query,
                    part.ids,
                    reduce_losses(query_change, self.flip).numpy(),
                    np.zeros(0) if null is None else reduce_losses(null[..., index] * weights, self.flip).numpy(),
                    {
                        "split_half_reliability": self.reliability(query_change),
                        "gradient_s": gradient_s / len(block),
                        "pass_s": pass_s / len(block),
                    },
                    self.parts(query_change),
                )
                yield of_copies.counting(part.images.weights)

    def _reference_derivatives(self, positions: list[int], directions: dict[str, Tensor]) -> Tensor:
        """Directional derivatives of the training images at these positions."""
        return self._derivatives(self.ready()[1].subset(positions), directions)

    def _derivatives(self, data: EncodedImages, directions: dict[str, Tensor]) -> Tensor:
        model, _, _, store, runner = self.ready()
        return measure_derivatives(
            model,
            data=data,
            grid=self.grid,
            directions=directions,
            store=store,
            runner=runner,
            batch_size=self.batch_size,
            progress=self.progress,
        )
