"""Attribution by unlearning (AbU): unlearn the query, and see which training pictures the model forgets with it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.attributors.base import Attributor, Need, Query, Say, Scores, TrainingData, Work, silent
from wherefrom.curvature import (
    Curvature,
    FisherSettings,
    Identity,
    ekfac_plan,
    fit_diagonal,
    fit_ekfac,
    load_diagonal,
    load_ekfac,
)
from wherefrom.data.latents import LatentSet
from wherefrom.diffusion import DiffusionModel
from wherefrom.evaluation.reliability import split_half
from wherefrom.losses import LossGrid, measure_losses
from wherefrom.parts import hash_tensors
from wherefrom.runner import Runner
from wherefrom.storage import Store
from wherefrom.unlearning import QueryLatent, Unlearned, UnlearningSettings, unlearn
from wherefrom.weights import Subset, moved_weights, select_weights

Flip = Literal["max", "mean"]
Form = Literal["diagonal", "ekfac"]


def reduce_losses(change: Float[Tensor, "n f k t r"], flip: Flip = "max") -> Float[Tensor, "n"]:
    """τ: the mean change of the losses over captions, timesteps and draws.

    Then the larger (or the mean) of picture and mirror image.
    """
    by_flip = change.double().flatten(2).mean(dim=2)
    return by_flip.amax(dim=1) if flip == "max" else by_flip.mean(dim=1)


class AttributionByUnlearning(Attributor):
    """τ(ẑ, z) = L(z; θ′) - L(z; θ₀), θ′ the weights after unlearning ẑ (AbU, sections 3.2 and 3.3).

    Args:
        weights: Which weights unlearning moves.
        unlearning: How the query is unlearned.
        grid: Where training losses are measured.
        flip: How a picture's score is made from its own and its mirror image's.
        curvature: Form of the Fisher information of a Newton step: its diagonal (AbU) or EK-FAC (AbU+, Fast Data
            Attribution, section 3).
        fisher: How the Fisher information is sampled.
        damping: Its relative damping.
        layers_per_pass: EK-FAC fits so many layers at a time, which bounds memory; null is all at once.
        fisher_path: Folder of a Fisher information made elsewhere, in the same form, instead of fitting one.
        curvature_from: Fingerprint of the model that `fisher_path` was made on, where it is another one.
        batch_size: Forward passes at a time; does not change the result.
    """

    requires: frozenset[Need] = frozenset({"model", "gradients", "prompt"})

    def __init__(
        self,
        weights: Subset = "cross_attention_kv",
        unlearning: UnlearningSettings = UnlearningSettings(),
        grid: LossGrid = LossGrid(),
        flip: Flip = "max",
        curvature: Form = "diagonal",
        fisher: FisherSettings = FisherSettings(),
        damping: float = 0.1,
        layers_per_pass: int | None = None,
        fisher_path: str | None = None,
        curvature_from: str | None = None,
        batch_size: int = 256,
    ) -> None:
        self.weights: Subset = weights
        self.unlearning, self.grid, self.flip = unlearning, grid, flip
        self.fisher, self.damping, self.batch_size = fisher, damping, batch_size
        self.form: Form = curvature
        if curvature not in ("diagonal", "ekfac"):
            raise ValueError(f"Unknown curvature {curvature!r}; choose 'diagonal' or 'ekfac'.")
        self.layers_per_pass, self.fisher_path, self.curvature_from = layers_per_pass, fisher_path, curvature_from
        self._ready: tuple[DiffusionModel, LatentSet, LatentSet | None, Store, Runner] | None = None

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {
            "method": "attribution by unlearning",
            "weights": self.weights,
            "unlearning": asdict(self.unlearning),
            "grid": asdict(self.grid),
            "flip": self.flip,
            "curvature": self.form,
            "fisher": asdict(self.fisher),
            "damping": self.damping,
            "fisher_path": self.fisher_path,
            "curvature_from": self.curvature_from,
        }

    def work(self, data: TrainingData, queries: int) -> Work:
        """Forward passes of the losses.

        And three for each sample of the Fisher information and of the query's gradient.
        """
        assert data.latents is not None
        held_out = 0 if data.held_out_latents is None else len(data.held_out_latents)
        flips = 2 if self.grid.flips else 1
        pictures = len(data.latents) + held_out
        losses = pictures * flips * data.latents.states.shape[1] * self.grid.timesteps * self.grid.draws
        own_fisher = self.unlearning.newton and self.fisher_path is None
        passes = 2 if self.form == "ekfac" else 1
        fisher = 3 * passes * len(data.latents) * self.fisher.per_picture if own_fisher else 0
        gradient = self.unlearning.steps * (3 * self.unlearning.draws + 15 * self.unlearning.measure_draws)
        latents = data.latents.latents.nbytes + data.latents.states.nbytes
        return Work(losses + fisher, losses + gradient, 4 * losses * (1 + queries), latents + 8 * losses)

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, say: Say = silent
    ) -> None:
        """Makes the curvature and the losses before unlearning, once per model."""
        if model is None or data.latents is None:
            raise ValueError("Attribution by unlearning needs a model and the latents of its training pictures.")
        self._ready = (model, data.latents, data.held_out_latents, store, runner)
        self.curvature = self._make_curvature(model, data.latents, store, runner, say)
        say(f"losses of {len(data.latents):,} training pictures before unlearning")
        self.before = self._losses(data.latents, None)
        empty = torch.zeros((0, *self.before.shape[1:]), dtype=self.before.dtype)
        self.null_before = self._losses(data.held_out_latents, None) if data.held_out_latents is not None else empty

    def _make_curvature(
        self, model: DiffusionModel, data: LatentSet, store: Store, runner: Runner, say: Say
    ) -> Curvature:
        if not self.unlearning.newton:
            return Identity()
        if self.fisher_path is not None:
            load = load_ekfac if self.form == "ekfac" else load_diagonal
            return load(Path(self.fisher_path), model, self.curvature_from, self.damping)
        names = list(select_weights(model.denoiser, self.weights))
        if self.form == "ekfac":
            say(ekfac_plan(model, data, names, self.fisher, self.layers_per_pass))
            return fit_ekfac(
                model,
                data,
                names,
                store,
                runner,
                self.fisher,
                self.damping,
                self.layers_per_pass,
                progress=self.progress,
            )
        say(f"Fisher information of {self.weights} over {len(data):,} training pictures")
        return fit_diagonal(model, data, names, store, runner, self.fisher, self.damping, progress=self.progress)

    def _losses(self, data: LatentSet, moved: Unlearned | None, weights: str | None = None) -> Tensor:
        assert self._ready is not None
        model, _, _, store, runner = self._ready
        if moved is None:
            return measure_losses(model, data, self.grid, store, runner, self.batch_size, weights, self.progress)
        with moved_weights(model.denoiser, moved.moved):
            return measure_losses(model, data, self.grid, store, runner, self.batch_size, weights, self.progress)

    def query_latent(self, query: Query) -> QueryLatent:
        """The query as the model sees it.

        Raises:
            ValueError: The model has no encoder.
        """
        assert self._ready is not None
        encoder = self._ready[0].encoder
        if encoder is None:
            raise ValueError("The model has no encoder, so it cannot read the query's prompt.")
        latent = query.latent
        if latent is None:
            latent = encoder.encode_image(query.pixels)
        return QueryLatent(query.id, latent, encoder.text.encode([query.prompt])[0])

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """One query at a time: unlearn, measure the losses again, take the difference."""
        if self._ready is None:
            raise ValueError("fit must run before score.")
        model, data, held_out, _, runner = self._ready
        chosen = self.positions(data.ids, candidates)
        part = data if candidates is None else data.subset(chosen)
        pretrained = model.fingerprint()
        for query in queries:
            started = time.monotonic()
            unlearned = unlearn(
                model, self.query_latent(query), self.weights, self.curvature, len(data), self.unlearning, runner
            )
            unlearn_s = time.monotonic() - started
            name = f"{pretrained} moved to {hash_tensors(unlearned.moved)}"  # what did not move decides the losses too
            change = self._losses(part, unlearned, name) - self.before[chosen]
            null = torch.zeros((0, *change.shape[1:]))
            if held_out is not None:
                null = self._losses(held_out, unlearned, name) - self.null_before
            yield Scores(
                query,
                part.ids,
                reduce_losses(change, self.flip).numpy(),
                reduce_losses(null, self.flip).numpy(),
                {
                    "split_half_reliability": self.reliability(change),
                    "query_loss": unlearned.losses[0],
                    "query_loss_rise": unlearned.rise,
                    "alpha": unlearned.alphas[0],
                    "unlearning_s": unlearn_s,
                    "losses_s": time.monotonic() - started - unlearn_s,
                },
            )

    def reliability(self, change: Float[Tensor, "n f k t r"]) -> float:
        """Split-half reliability of the scores over the (t, ε) draws; NaN with a single draw."""
        draws = change.double().mean(dim=2).flatten(2)

        def score(part: Int64[NDArray[np.int64], "h"]) -> Float[NDArray[np.float64], "n"]:
            return reduce_losses(draws[:, :, None, torch.from_numpy(part), None], self.flip).numpy()

        return split_half(score, draws.shape[2], self.grid.seed)
