"""TRAK (Park et al. 2023) and D-TRAK (Zheng et al. 2024): projected gradients, compared through their inverse Gram."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from wherefrom.attributors.base import Attributor, Need, Query, Say, Scores, TrainingData, Work, silent
from wherefrom.attributors.curved import as_latent
from wherefrom.data.latents import LatentSet
from wherefrom.diffusion import DiffusionModel, SquareOutput
from wherefrom.losses import LossGrid
from wherefrom.pipeline import load_model
from wherefrom.projection import Projection
from wherefrom.reduction import Flip
from wherefrom.rows import Rows
from wherefrom.runner import Runner
from wherefrom.storage import Store
from wherefrom.trak import Kernel, check_ridge, in_double, project_pictures
from wherefrom.unlearning import QueryLatent, QueryLoss
from wherefrom.weights import Subset, select_weights, trainable

Output = Literal["loss", "square_output"]


class TRAK(Attributor):
    """φ(ẑ)ᵀ (ΦᵀΦ + λI)⁻¹ φ(z), φ the projected mean gradient, averaged over an ensemble of models.

    With `output: square_output` it is D-TRAK, whose gradients are those of the mean squared output on both sides.

    Args:
        weights: Which weights' gradients are projected; the papers take all.
        output: What is differentiated.
        projection: P.
        grid: Where the training pictures' gradients are averaged.
        draws: (t, ε) draws of which the query's gradient is the mean.
        relative_lambda: λ relative to the mean diagonal of ΦᵀΦ, whose rows are the pictures without mirror images.
        absolute_lambda: λ itself, instead.
        flip: How a picture's score is made from its own and its mirror image's.
        ensemble: Pipelines of further models, trained on the same pictures with the same autoencoder; scores are
            averaged over all models.
        batch_size: Samples at a time; does not change the result.
        seed: Seed of the query's draws.

    Raises:
        ValueError: λ is not positive, both or neither are given, the output is unknown, or a number is not positive.
    """

    requires: frozenset[Need] = frozenset({"model", "gradients", "prompt"})
    takes_regions = True

    def __init__(
        self,
        weights: Subset = "all",
        output: Output = "loss",
        projection: Projection = Projection(),
        grid: LossGrid = LossGrid(timesteps=10),
        draws: int = 500,
        relative_lambda: float | None = 0.01,
        absolute_lambda: float | None = None,
        flip: Flip = "max",
        ensemble: list[str] | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        check_ridge(relative_lambda, absolute_lambda)
        if output not in ("loss", "square_output"):
            raise ValueError(f"Unknown output {output!r}; choose 'loss' or 'square_output'.")
        if draws < 1:
            raise ValueError(f"draws must be at least 1; given {draws}.")
        self.weights: Subset = weights
        self.output: Output = output
        self.projection, self.grid, self.draws = projection, grid, draws
        self.relative_lambda, self.absolute_lambda = relative_lambda, absolute_lambda
        self.flip, self.ensemble, self.batch_size, self.seed = flip, list(ensemble or []), batch_size, seed
        self._ready: tuple[DiffusionModel, LatentSet, LatentSet | None, Runner] | None = None

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {
            "method": "D-TRAK" if self.output == "square_output" else "TRAK",
            "weights": self.weights,
            "projection": self.projection.identity(),
            "grid": asdict(self.grid),
            "draws": self.draws,
            "relative_lambda": self.relative_lambda,
            "absolute_lambda": self.absolute_lambda,
            "flip": self.flip,
            "ensemble": self.ensemble,
            "seed": self.seed,
        }

    def work(self, data: TrainingData, queries: int) -> Work:
        """Three forward passes for each sample of the training grid and of the query's gradient, for each model."""
        assert data.latents is not None
        held_out = 0 if data.held_out_latents is None else len(data.held_out_latents)
        flips, models = (2 if self.grid.flips else 1), 1 + len(self.ensemble)
        rows = (len(data.latents) + held_out) * flips * models
        samples = rows * self.grid.per_flip(data.latents.states.shape[1])
        features = 4 * rows * self.projection.dimension
        return Work(
            3 * samples, 3 * self.draws * models, features, features + 8 * models * self.projection.dimension**2
        )

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, say: Say = silent
    ) -> None:
        """Projects the gradients of all pictures, once per model."""
        if model is None or data.latents is None:
            raise ValueError("TRAK needs a model and the latents of its training pictures.")
        self._ready = (model, data.latents, data.held_out_latents, runner)
        self.models = [self._with_output(each) for each in [model, *self._others(model)]]
        self.features: list[Rows] = []
        self.null: list[Rows] = []
        self.kernels: list[Kernel] = []
        for number, each in enumerate(self.models, start=1):
            say(f"projected gradients of {len(data.latents):,} pictures, model {number} of {len(self.models)}")
            names = list(select_weights(each.denoiser, self.weights))
            for found, part in ((self.features, data.latents), (self.null, data.held_out_latents)):
                if part is not None:
                    found.append(
                        project_pictures(
                            each,
                            part,
                            self.grid,
                            names,
                            self.projection,
                            store,
                            runner,
                            self.batch_size,
                            self.progress,
                        )
                    )
            self.kernels.append(Kernel(self.features[-1].values[:, 0], self.relative_lambda, self.absolute_lambda))

    def _others(self, model: DiffusionModel) -> list[DiffusionModel]:
        """The ensemble's further models.

        Raises:
            ValueError: One was made for other latents or captions than the first.
        """
        others = []
        for source in self.ensemble:
            other = load_model(source).to(model.device)
            mine, theirs = (None if one.encoder is None else one.encoder.identity() for one in (model, other))
            if mine != theirs:
                raise ValueError(
                    f"{source} has another autoencoder or text encoder than the model that is attributed; an ensemble "
                    "shares latents and captions."
                )
            other.denoiser.to(model.dtype)
            others.append(other)
        return others

    def _with_output(self, model: DiffusionModel) -> DiffusionModel:
        return SquareOutput(model) if self.output == "square_output" else model

    def query_features(self, model: DiffusionModel, query: QueryLatent, runner: Runner) -> Tensor:
        """φ(ẑ), shape (1, D)."""
        parameters = select_weights(model.denoiser, self.weights)
        with trainable(model.denoiser, parameters):
            gradients = QueryLoss(model, query, self.seed, runner).gradient(parameters, 0, self.draws)
        return self.projection.project({name: value.unsqueeze(0) for name, value in gradients.items()})

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """One query at a time: its gradient, and an inner product with every picture."""
        if self._ready is None:
            raise ValueError("fit must run before score.")
        model, data, _, runner = self._ready
        chosen = self.positions(data.ids, candidates)
        for query in queries:
            started = time.monotonic()
            as_seen = as_latent(model, query)
            directions = [
                kernel.solve(self.query_features(each, as_seen, runner).cpu())[0]
                for each, kernel in zip(self.models, self.kernels, strict=True)
            ]
            gradient_s = time.monotonic() - started
            yield Scores(
                query,
                tuple(data.ids[position] for position in chosen),
                self._scores(self.features, directions)[chosen],
                self._scores(self.null, directions) if self.null else np.zeros(0),
                {"gradient_s": gradient_s, "query_s": time.monotonic() - started},
            )

    def _scores(self, features: Sequence[Rows], directions: Sequence[Tensor]) -> np.ndarray:
        products = [
            torch.cat([block @ direction for block in in_double(each.values)])
            for each, direction in zip(features, directions, strict=True)
        ]
        by_flip = torch.stack(products).mean(dim=0)
        scores: np.ndarray = (by_flip.amax(dim=1) if self.flip == "max" else by_flip.mean(dim=1)).numpy()
        return scores
