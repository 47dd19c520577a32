"""Base of TRAK, D-TRAK and JourneyTRAK: φ(ẑ)ᵀ (ΦᵀΦ + λI)⁻¹ φ(z) with projected gradients φ."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wherefrom.attributors.base import Attributor, Need
from wherefrom.attributors.compute_estimate import ComputeEstimate
from wherefrom.attributors.trak.projected_features import (
    Kernel,
    check_projection,
    check_ridge,
    in_double,
    project_each,
    project_images,
)
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossGrid, LossSamples
from wherefrom.gradients.projection import Projection
from wherefrom.gradients.query_loss import QueryLoss
from wherefrom.gradients.score_reduction import Flip
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.model_ensemble import load_ensemble
from wherefrom.models.parameter_subsets import Subset, select_weights, trainable
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.ranges import check_ranges
from wherefrom.runtime.row_cache import Rows
from wherefrom.runtime.stable_names import settings_identity

# Generating P takes longer than a query's gradient, so queries share it; an interruption loses one block.
_QUERIES_AT_A_TIME = 16


class ProjectedGradients(Attributor):
    """Base of TRAK and its relatives (Park et al. 2023): Σ_s φ_s(ẑ)ᵀ (ΦᵀΦ + λI)⁻¹ φ(z), averaged over an ensemble.

    φ(z) = Pᵀ ∇L(z) is the projected gradient of a training image, averaged over its captions, timesteps and noise
    samples; Φ (N × D) has one such row for each training image. Subclasses define the query's gradients φ_s(ẑ), one for
    each step s. There is no weighting term Q, as in D-TRAK. With an ensemble, the whole score is averaged over models.

    `fit` stores φ of images and mirror images, shape (N, F, D), and the Cholesky factor of ΦᵀΦ + λI, for each model.

    Where training sees image i wᵢ times, the kernel is ΦᵀWΦ + λI with W = diag(w), and the score of image i is wᵢ
    φ(ẑ)ᵀ (ΦᵀWΦ + λI)⁻¹ φ(zᵢ). TRAK's score is a one-step approximation of what removing an image does to the linearised
    model, whose Newton step from the weighted objective Σ wⱼ ℓⱼ without its i-th term is wᵢ (ΦᵀWΦ + λI)⁻¹ φ(zᵢ) times
    the slope of the loss (the leverage 1 / (1 - wᵢ hᵢ) is dropped, as in the paper): all copies go together. It is the
    sum of the scores that wᵢ copies under ids of their own would have; `per_copy` holds that of one.

    Args:
        weights: Parameters whose gradients are projected; the papers take all.
        projection: P, the random projection to D dimensions.
        grid: Timesteps and noise samples over which a training image's gradient is averaged.
        noise_samples: Number of (t, ε) samples over which each of the query's gradients is averaged.
        relative_lambda: λ relative to the mean diagonal of ΦᵀΦ, whose rows are the images without mirror images.
        absolute_lambda: λ itself, instead.
        flip: How the scores of an image and of its mirror image are combined.
        ensemble: Pipelines of further models, trained on the same images with the same autoencoder; scores are
            averaged over all models.
        batch_size: Samples at a time; does not change the result.
        seed: Seed of the query's noise samples.

    Raises:
        ValueError: λ is not positive, both or neither are given, the projection is too small, or a number is not
            positive.
    """

    requires: frozenset[Need] = frozenset({"model", "gradients", "prompt"})
    takes_regions = True
    method: str

    def __init__(
        self,
        weights: Subset,
        *,
        projection: Projection,
        grid: LossGrid | LossSamples,
        noise_samples: int,
        relative_lambda: float | None,
        absolute_lambda: float | None,
        flip: Flip,
        ensemble: list[str] | None,
        batch_size: int,
        seed: int,
    ) -> None:
        check_ridge(relative_lambda, absolute_lambda)
        check_projection(projection)
        check_ranges(noise_samples=noise_samples, batch_size=batch_size, seed=seed)
        self.weights: Subset = weights
        self.projection, self.grid, self.noise_samples = projection, grid, noise_samples
        self.relative_lambda, self.absolute_lambda = relative_lambda, absolute_lambda
        self.flip, self.ensemble, self.batch_size, self.seed = flip, list(ensemble or []), batch_size, seed
        self._ready: tuple[EncodedImages, Runner] | None = None

    @abstractmethod
    def query_steps(self, query: Query) -> Sequence[int]:
        """Steps s of a query; each has a gradient φ_s(ẑ)."""

    @abstractmethod
    def query_loss(self, model: DiffusionModel, query: Query, runner: Runner) -> QueryLoss:
        """The query's loss, as a function of the step."""

    def differentiated(self, model: DiffusionModel) -> DiffusionModel:
        """The model whose `losses` are the output function differentiated for queries and training images."""
        return model

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {
            "method": self.method,
            "weights": self.weights,
            "projection": self.projection.identity(),
            "grid": settings_identity(self.grid),
            "draws": self.noise_samples,
            "relative_lambda": self.relative_lambda,
            "absolute_lambda": self.absolute_lambda,
            "flip": self.flip,
            "ensemble": self.ensemble,
            "seed": self.seed,
        }

    def max_query_steps(self) -> int:
        """Largest number of steps of a query."""
        return 1

    def estimate(self, data: TrainingData, queries: int) -> ComputeEstimate:
        """Three forward passes for each sample of the training grid and of the query's gradients, for each model."""
        assert data.latents is not None
        held_out = 0 if data.held_out_latents is None else len(data.held_out_latents)
        flips, models = (2 if self.grid.flips else 1), 1 + len(self.ensemble)
        rows = (len(data.latents) + held_out) * flips * models
        samples = rows * self.grid.per_flip(data.latents.captions_per_image)
        per_query = self.noise_samples * self.max_query_steps() * models
        features = 4 * rows * self.projection.dimension
        return ComputeEstimate(
            3 * samples, 3 * per_query, features, features + 8 * models * self.projection.dimension**2
        )

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Projects the gradients of all images, once per model."""
        if model is None or data.latents is None:
            raise ValueError(f"{self.method} needs a model and the latents of its training images.")
        data.latents.check(model)
        members = [model, *load_ensemble(model, self.ensemble, self.weights)]
        self._ready = (data.latents, runner)
        self.models = [self.differentiated(each) for each in members]
        self.features: list[Rows] = []
        self.null: list[Rows] = []
        self.kernels: list[Kernel] = []
        for number, each in enumerate(self.models, start=1):
            log(f"projected gradients of {len(data.latents):,} images, model {number} of {len(self.models)}")
            self.features.append(self._project(each, data.latents, store, runner))
            if data.held_out_latents is not None:
                self.null.append(self._project(each, data.held_out_latents, store, runner))
            images = self.features[-1].values[:, 0]  # without their mirror images
            self.kernels.append(Kernel(images, self.relative_lambda, self.absolute_lambda, data.latents.weights))

    def _project(self, model: DiffusionModel, part: EncodedImages, store: Store, runner: Runner) -> Rows:
        names = list(select_weights(model.denoiser, self.weights))
        return project_images(
            model,
            data=part,
            grid=self.grid,
            names=names,
            projection=self.projection,
            store=store,
            runner=runner,
            batch_size=self.batch_size,
            progress=self.progress,
        )

    def query_features(
        self, model: DiffusionModel, queries: Sequence[Query], runner: Runner
    ) -> list[Float[Tensor, "s d"]]:
        """φ_s(ẑ) of each query's steps; P is generated once for as many gradients as fit in memory."""
        parameters = select_weights(model.denoiser, self.weights)
        steps = [self.query_steps(query) for query in queries]

        def gradients() -> Iterator[Mapping[str, Tensor]]:
            for query, each in zip(queries, steps, strict=True):
                loss = self.query_loss(model, query, runner)
                for step in each:
                    yield loss.gradient(parameters, step, self.noise_samples)

        with trainable(model.denoiser, parameters):
            rows = project_each(self.projection, gradients())
        return list(rows.split([len(each) for each in steps]))

    def directions(self, queries: Sequence[Query]) -> list[list[Float[Tensor, "s d"]]]:
        """(ΦᵀΦ + λI)⁻¹ φ_s(ẑ) of each query's steps, for each model.

        Raises:
            ValueError: `fit` has not run.
        """
        if self._ready is None:
            raise ValueError("fit must run before score.")
        _, runner = self._ready
        pairs = zip(self.models, self.kernels, strict=True)
        by_model = [
            [kernel.solve(rows.cpu()) for rows in self.query_features(each, queries, runner)] for each, kernel in pairs
        ]
        return [list(of_query) for of_query in zip(*by_model, strict=True)]

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """Computes gradients for a block of queries at a time, then inner products with the features of every image."""
        if self._ready is None:
            raise ValueError("fit must run before score.")
        data, _ = self._ready
        chosen = self.positions(data.ids, candidates)
        ids = tuple(data.ids[position] for position in chosen)
        for start in range(0, len(queries), _QUERIES_AT_A_TIME):
            block = queries[start : start + _QUERIES_AT_A_TIME]
            started = time.monotonic()
            result = self.directions(block)
            gradient_s = (time.monotonic() - started) / len(block)
            for query, steps in zip(block, result, strict=True):
                started = time.monotonic()
                directions = [each.sum(dim=0, keepdim=True) for each in steps]
                scores = self.products(self.features, directions)[0][chosen]
                null = self.products(self.null, directions)[0] if self.null else np.zeros(0)
                query_s = gradient_s + time.monotonic() - started
                of_copies = Scores(query, ids, scores, null, {"gradient_s": gradient_s, "query_s": query_s})
                yield of_copies.counting(None if data.images.weights is None else data.images.weights[chosen])

    def products(self, features: Sequence[Rows], directions: Sequence[Float[Tensor, "s d"]]) -> np.ndarray:
        """Scores of one copy of all images by each direction, (S, N): the mean over models, then the flips reduced."""
        result = [
            torch.cat([block @ direction.T for block in in_double(each.values)])
            for each, direction in zip(features, directions, strict=True)
        ]
        by_flip = torch.stack(result).mean(dim=0)
        scores: np.ndarray = (by_flip.amax(dim=1) if self.flip == "max" else by_flip.mean(dim=1)).T.numpy()
        return scores
