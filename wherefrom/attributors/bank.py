"""Influence functions whose training side is paid once: see `wherefrom.bank`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from wherefrom.attributors.base import Query, Say, Scores, TrainingData, Work, silent
from wherefrom.attributors.curved import CurvedAttributor, Form
from wherefrom.bank import Bank, BankMaker, Compression
from wherefrom.curvature import FisherSettings
from wherefrom.diffusion import DiffusionModel
from wherefrom.losses import LossGrid
from wherefrom.reduction import Breakdown, Flip, TimestepWeights
from wherefrom.runner import Runner
from wherefrom.storage import Store
from wherefrom.token_gradients import TokenBank
from wherefrom.unlearning import QueryLoss
from wherefrom.weights import Subset, select_weights, trainable


class InfluenceBank(CurvedAttributor):
    """∇L(ẑ)ᵀ F⁻¹ ∇L(z) / N from a bank of training gradients: a query costs its own gradient and a matrix product.

    It is `InfluenceFunction` but for what the compression cuts off, and for timestep weights, which cannot depend on
    the query. The first-order score misjudges the pictures that are nearest to a query, whose losses are most curved:
    let an exact method score the first and last pictures again (`AmongNearest` with `tails: both`).

    Args:
        weights: Which weights' gradients count.
        draws: (t, ε) draws of which the query's gradient is the mean.
        grid: Where training losses are differentiated.
        compression: How the rows of the bank are kept.
        flip: How a picture's score is made from its own and its mirror image's.
        curvature: Form of F: diagonal, EK-FAC, or none.
        fisher: How F is sampled.
        damping: Its relative damping.
        layers_per_pass: EK-FAC fits so many layers at a time, which bounds memory; null is all at once.
        fisher_path: Folder of a Fisher information made elsewhere, in the same form, instead of fitting one.
        curvature_from: Fingerprint of the model that `fisher_path` was made on, where it is another one.
        half: Keep the rows in half precision.
        batch_size: Samples at a time; does not change the result.
        seed: Seed of the query's draws.
        timestep_weights: `equal` takes the plain mean over timesteps; `spread` divides each timestep's gradients by
            their root mean square length after whitening, over 256 training pictures.

    Raises:
        ValueError: The form of curvature is unknown, or a number is not positive.
    """

    def __init__(
        self,
        weights: Subset = "cross_attention_kv",
        draws: int = 2000,
        grid: LossGrid = LossGrid(),
        compression: Compression = Compression(),
        flip: Flip = "max",
        curvature: Form = "ekfac",
        fisher: FisherSettings = FisherSettings(),
        damping: float = 0.1,
        layers_per_pass: int | None = None,
        fisher_path: str | None = None,
        curvature_from: str | None = None,
        half: bool = True,
        batch_size: int = 64,
        seed: int = 0,
        timestep_weights: TimestepWeights = "spread",
    ) -> None:
        super().__init__(
            weights,
            grid,
            flip,
            curvature,
            fisher,
            damping,
            layers_per_pass,
            fisher_path,
            curvature_from,
            batch_size,
            Breakdown(),
            timestep_weights,
        )
        if draws < 1:
            raise ValueError(f"draws must be at least 1; given {draws}.")
        self.draws, self.compression, self.half, self.seed = draws, compression, half, seed
        self._banks: tuple[Bank | TokenBank, Bank | TokenBank | None] | None = None

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {
            "method": "influence bank",
            "draws": self.draws,
            "seed": self.seed,
            "half": self.half,
            "compression": self.compression.identity(),
            **super().identity(),
        }

    def work(self, data: TrainingData, queries: int) -> Work:
        """Three forward passes for each sample of the curvature and of the training grid, once; then the gradients."""
        assert data.latents is not None
        samples = self.losses_of(data)
        rows = samples // (data.latents.states.shape[1] * self.grid.timesteps * self.grid.draws)
        width = self.compression.dimension or 0  # else the model says how large rows are, and `fit` tells
        once = self.curvature_passes(data) + 3 * samples
        return Work(once, 3 * self.draws, rows * width * (2 if self.half else 4), data.latents.held_bytes)

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, say: Say = silent
    ) -> None:
        """Makes the curvature and the banks of the training pictures and of the null, once per model."""
        model, latents = self.prepare(data, model, store, runner, say)
        started = time.monotonic()
        curvature = {
            "form": self.form,
            "damping": self.damping,
            "fisher": self.identity()["fisher"],
            "fisher_path": self.fisher_path,
            "of": latents.fingerprint,
        }
        maker = BankMaker(
            model,
            latents,
            self.grid,
            list(select_weights(model.denoiser, self.weights)),
            self.curvature,
            curvature,
            self.compression,
            self.timestep_weights == "spread",
            self.half,
            store,
            runner,
            self.batch_size,
            self.progress,
        )
        say(f"bank of the gradients of {len(latents):,} training pictures: {maker.size(latents) / 2**20:.2f} MiB")
        held_out = data.held_out_latents
        self._banks = maker.make(latents), maker.make(held_out) if held_out is not None and len(held_out) else None
        self.fit_s = {**self.fit_s, "bank": time.monotonic() - started}

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """One query at a time: its gradient, and an inner product with every picture."""
        model, data, _, _, runner = self.ready()
        assert self._banks is not None
        bank, null = self._banks
        chosen = self.positions(data.ids, candidates)
        parameters = select_weights(model.denoiser, self.weights)
        for query in queries:
            started = time.monotonic()
            with trainable(model.denoiser, parameters):
                gradients = QueryLoss(model, self.query_latent(query), self.seed, runner).gradient(
                    parameters, 0, self.draws
                )
            gradient_s = time.monotonic() - started
            scores = self._by_flip(bank, gradients)[chosen] / len(data)
            yield Scores(
                query,
                tuple(data.ids[position] for position in chosen),
                scores,
                np.zeros(0) if null is None else self._by_flip(null, gradients) / len(data),
                {"gradient_s": gradient_s, "product_s": time.monotonic() - started - gradient_s},
            )

    def _by_flip(self, bank: Bank | TokenBank, gradients: dict[str, torch.Tensor]) -> np.ndarray:
        by_flip = bank.influence(gradients)
        scores: np.ndarray = (by_flip.amax(dim=1) if self.flip == "max" else by_flip.mean(dim=1)).numpy()
        return scores
