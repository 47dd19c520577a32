"""Influence functions from stored training gradients; see `wherefrom.attributors.influence.gradient_bank`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.attributors.compute_estimate import ComputeEstimate
from wherefrom.attributors.influence.gradient_bank import Bank, BankBuilder, Compression
from wherefrom.attributors.influence.token_factors import TokenBank
from wherefrom.attributors.preconditioned import PreconditionedAttributor
from wherefrom.curvature import EKFAC, Curvature
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.gradients.query_loss import QueryLoss
from wherefrom.gradients.score_reduction import Breakdown, Flip, TimestepWeights
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset, select_weights, trainable
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.ranges import check_ranges


class InfluenceBank(PreconditionedAttributor):
    """Influence functions (Koh and Liang 2017) from stored training gradients: ∇L(ẑ)ᵀ F⁻¹ ∇L(z) / N.

    The gradients ∇L(z) of all training images are computed once and stored, either exactly as token factors or whitened
    (F^(-1/2) ∇L(z)) and compressed; a query then costs its own gradient and one matrix product. The scores equal those
    of `InfluenceFunction` up to the compression error and the timestep weights, which here cannot depend on the query.
    An image that training sees wᵢ times scores wᵢ-fold, as there.

    The first-order score is least accurate for the images nearest to the query, where the loss has the largest
    curvature: it often ranks the query's own image last. There are two remedies: rescore both ends of the ranking by a
    slower method (`Rerank` with `tails: both`), or add a second-order term. A step δ changes an image's loss by
    gᵀδ + ½ δᵀHδ; where the model has fitted the image, H is close to that image's Fisher information, so the second
    term grows as (gᵀδ)². Large first-order scores of either sign then rank first.

    Args:
        weights: Parameters that are differentiated.
        noise_samples: Number of (t, ε) samples over which the query's gradient is averaged.
        grid: Timesteps and noise samples at which training losses are differentiated.
        compression: How the stored gradients are compressed.
        flip: How the scores of an image and of its mirror image are combined.
        curvature: Estimator of F: `EKFAC`, `DiagonalFisher`, or `Identity` (plain gradient similarity).
        half: Store the rows in float16.
        batch_size: Samples at a time; does not change the result.
        seed: Seed of the query's noise samples.
        second_order: c in the corrected score s + c · s² / σ, where σ is the standard deviation of the query's scores
            over the training set; 0 keeps the first-order score. There is no default for c: tune it.
        timestep_weights: `equal` takes the plain mean over timesteps; `spread` divides each timestep's gradients by
            their root mean square length after whitening, over 256 training images.

    Raises:
        ValueError: The timesteps' weights are unknown, or a number is not positive.
    """

    def __init__(
        self,
        weights: Subset = "cross_attention_kv",
        *,
        noise_samples: int = 2000,
        grid: LossGrid = LossGrid(),
        compression: Compression = Compression(),
        flip: Flip = "max",
        curvature: Curvature = EKFAC(),
        half: bool = True,
        batch_size: int = 64,
        seed: int = 0,
        timestep_weights: TimestepWeights = "spread",
        second_order: float = 0.0,
    ) -> None:
        super().__init__(
            weights,
            curvature=curvature,
            grid=grid,
            flip=flip,
            batch_size=batch_size,
            breakdown=Breakdown(),
            timestep_weights=timestep_weights,
        )
        check_ranges(noise_samples=noise_samples, seed=seed, second_order=second_order)
        self.noise_samples, self.compression, self.half, self.seed = noise_samples, compression, half, seed
        self.second_order = second_order
        self._banks: tuple[Bank | TokenBank, Bank | TokenBank | None] | None = None

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {
            "method": "influence bank",
            "draws": self.noise_samples,
            "seed": self.seed,
            "half": self.half,
            "compression": self.compression.identity(),
            **({"second_order": self.second_order} if self.second_order else {}),
            **super().identity(),
        }

    def estimate(self, data: TrainingData, queries: int) -> ComputeEstimate:
        """Three forward passes for each sample of curvature and training grid, once; then those of query gradients."""
        assert data.latents is not None
        samples = self.grid_passes(data)
        rows = samples // (data.latents.captions_per_image * self.grid.timesteps * self.grid.noise_samples)
        width = (
            self.compression.dimension or 0
        )  # factors and uncut eigenbases: known only with the model; `fit` logs it
        once = self.curvature_passes(data) + 3 * samples
        return ComputeEstimate(
            once, 3 * self.noise_samples, rows * width * (2 if self.half else 4), data.latents.held_bytes
        )

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Fits the curvature and computes the banks of training and held-out images, once per model."""
        model, latents = self.prepare(data, model, store, runner, log)
        started = time.monotonic()
        settings = self.curvature.identity()
        curvature = {
            "form": settings["curvature"],
            **{key: settings[key] for key in ("damping", "fisher", "fisher_path")},
            "of": latents.weighted_fingerprint,
        }
        builder = BankBuilder(
            model,
            training=latents,
            grid=self.grid,
            names=list(select_weights(model.denoiser, self.weights)),
            curvature=self.curvature_matrix,
            curvature_identity=curvature,
            compression=self.compression,
            spread=self.timestep_weights == "spread",
            half=self.half,
            store=store,
            runner=runner,
            batch_size=self.batch_size,
            progress=self.progress,
        )
        log(f"bank of the gradients of {len(latents):,} training images: {builder.size(latents) / 2**20:.2f} MiB")
        held_out = data.held_out_latents
        self._banks = (
            builder.build(latents),
            builder.build(held_out) if held_out is not None and len(held_out) else None,
        )
        self.fit_s = {**self.fit_s, "bank": time.monotonic() - started}

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """One query at a time: its gradient, then inner products with the stored rows."""
        model, data, _, _, runner = self.ready()
        assert self._banks is not None
        bank, null = self._banks
        chosen = self.positions(data.ids, candidates)
        parameters = select_weights(model.denoiser, self.weights)
        for query in queries:
            started = time.monotonic()
            with trainable(model.denoiser, parameters):
                gradients = QueryLoss(model, self.query_latent(query), self.seed, runner).gradient(
                    parameters, 0, self.noise_samples
                )
            gradient_s = time.monotonic() - started
            first_order = bank.influence(gradients) / data.seen
            spread = _spread(first_order, data.weights)
            scores = self._corrected(first_order, spread)[chosen]
            of_copies = Scores(
                query,
                tuple(data.ids[position] for position in chosen),
                scores,
                np.zeros(0) if null is None else self._corrected(null.influence(gradients) / data.seen, spread),
                {"gradient_s": gradient_s, "product_s": time.monotonic() - started - gradient_s},
            )
            weights = data.images.weights
            yield of_copies.counting(None if weights is None else weights[chosen])

    def _corrected(self, first_order: Float[Tensor, "n f"], spread: float) -> Float[NDArray[np.float64], " n"]:
        """Corrected scores s + c · s² / σ of image and mirror image, reduced to the maximum or mean of the two."""
        by_flip = first_order
        if self.second_order and spread > 0:  # σ = 0: all scores are equal, and the term is undefined
            by_flip = first_order + self.second_order * first_order.square() / spread
        scores: np.ndarray = (by_flip.amax(dim=1) if self.flip == "max" else by_flip.mean(dim=1)).numpy()
        return scores


def _spread(first_order: Float[Tensor, "n f"], weights: Float[Tensor, " n"] | None) -> float:
    """σ, the standard deviation of the scores over the training set, an image counting as often as it is seen."""
    if weights is None:
        return float(first_order.std(correction=0))
    share = (weights / weights.sum())[:, None] / first_order.shape[1]
    mean = (share * first_order).sum()
    return float((share * (first_order - mean).square()).sum().sqrt())
