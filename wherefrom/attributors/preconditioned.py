"""What methods share that take a query's gradient, precondition it with a curvature, and look at training losses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.attributors.base import Attributor, Need
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
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.gradients.query_loss import QueryLatent, as_latent
from wherefrom.gradients.score_reduction import Breakdown, Flip, TimestepWeights, reduce_losses, spread_weights
from wherefrom.metrics.reliability import split_half
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset, select_weights
from wherefrom.queries.types import Query, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.stable_names import settings_identity

Form = Literal["diagonal", "ekfac", "identity"]
_REFERENCE = 256  # training images whose changes say how far a timestep's changes spread


class PreconditionedAttributor(Attributor):
    """Base of the methods with a curvature.

    Args:
        weights: Which weights' gradients count.
        grid: Where training losses are measured.
        flip: How an image's score is made from its own and its mirror image's.
        curvature: Form of the Fisher information: its diagonal, EK-FAC, or none.
        fisher: How it is sampled.
        damping: Its relative damping.
        layers_per_pass: EK-FAC fits so many layers at a time, which bounds memory; null is all at once.
        fisher_path: Folder of a Fisher information made elsewhere, in the same form, instead of fitting one.
        curvature_from: Fingerprint of the model that `fisher_path` was made on, where it is another one.
        batch_size: Forward passes at a time; does not change the result.
        breakdown: Which parts of the scores are kept beside them.
        timestep_weights: `equal` takes the plain mean over timesteps, as the papers do; `spread` (ours) divides each
            timestep's changes by their spread over 256 training images, so that no timestep drowns the others.

    Raises:
        ValueError: The form of curvature or the timesteps' weights are unknown, or there are more timestep bands than
            timesteps.
    """

    requires: frozenset[Need] = frozenset({"model", "gradients", "prompt"})
    takes_regions = True

    def __init__(
        self,
        weights: Subset,
        *,
        grid: LossGrid,
        flip: Flip,
        curvature: Form,
        fisher: FisherSettings,
        damping: float,
        layers_per_pass: int | None,
        fisher_path: str | None,
        curvature_from: str | None,
        batch_size: int,
        breakdown: Breakdown,
        timestep_weights: TimestepWeights,
    ) -> None:
        if timestep_weights not in ("equal", "spread"):
            raise ValueError(f"Unknown timestep_weights {timestep_weights!r}; choose 'equal' or 'spread'.")
        self.timestep_weights: TimestepWeights = timestep_weights
        breakdown.check(grid.timesteps)
        if curvature not in ("diagonal", "ekfac", "identity"):
            raise ValueError(f"Unknown curvature {curvature!r}; choose 'diagonal', 'ekfac' or 'identity'.")
        self.weights: Subset = weights
        self.grid, self.flip, self.batch_size, self.breakdown = grid, flip, batch_size, breakdown
        self.form: Form = curvature
        self.fisher, self.damping, self.layers_per_pass = fisher, damping, layers_per_pass
        self.fisher_path, self.curvature_from = fisher_path, curvature_from
        self._ready: tuple[DiffusionModel, EncodedImages, EncodedImages | None, Store, Runner] | None = None
        self._taken: Curvature | None = None

    def take_curvature(
        self, model: DiffusionModel, data: TrainingData, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Makes the curvature on this model and data, and uses it from now on, whatever model is attributed.

        For models customized from one base, whose curvature serves them all (AbU, section 5.2).

        Raises:
            ValueError: There are no latents, or the curvature cannot be made.
        """
        if data.latents is None:
            raise ValueError(f"{type(self).__name__} takes curvature over latents; there are none.")
        self._taken = self._make_curvature(model, data.latents, store, runner, log)
        self.curvature_from = f"{model.fingerprint()} over {data.latents.fingerprint}"

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {
            "weights": self.weights,
            "grid": settings_identity(self.grid),
            "flip": self.flip,
            "curvature": self.form,
            "fisher": settings_identity(self.fisher),
            "damping": self.damping,
            "fisher_path": self.fisher_path,
            "curvature_from": self.curvature_from,
            "breakdown": settings_identity(self.breakdown),
            "timestep_weights": self.timestep_weights,
        }

    def prepare(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log
    ) -> tuple[DiffusionModel, EncodedImages]:
        """Remembers what is attributed to, and makes the curvature.

        Raises:
            ValueError: There is no model, or no latents; or the curvature cannot be made or is another model's.
        """
        if model is None or data.latents is None:
            raise ValueError(f"{type(self).__name__} needs a model and the latents of its training images.")
        data.latents.check(model)
        self._ready = (model, data.latents, data.held_out_latents, store, runner)
        started = time.monotonic()
        self.curvature = self._make_curvature(model, data.latents, store, runner, log)
        self.fit_s = {"curvature": time.monotonic() - started}
        return model, data.latents

    def ready(self) -> tuple[DiffusionModel, EncodedImages, EncodedImages | None, Store, Runner]:
        """What `prepare` remembered.

        Raises:
            ValueError: `fit` has not run.
        """
        if self._ready is None:
            raise ValueError("fit must run before score.")
        return self._ready

    def losses_of(self, data: TrainingData) -> int:
        """Forward passes that measure all images, the null included, on the grid once."""
        assert data.latents is not None
        held_out = 0 if data.held_out_latents is None else len(data.held_out_latents)
        flips = 2 if self.grid.flips else 1
        images = len(data.latents) + held_out
        return images * flips * data.latents.captions_per_image * self.grid.timesteps * self.grid.noise_samples

    def curvature_passes(self, data: TrainingData) -> int:
        """Forward passes that the curvature costs; a backward pass counts as two."""
        assert data.latents is not None
        passes = {"identity": 0, "diagonal": 1, "ekfac": 2}[self.form]
        made = self.fisher_path is not None or self._taken is not None
        return 0 if made else 3 * passes * len(data.latents) * self.fisher.per_image

    def _make_curvature(
        self, model: DiffusionModel, data: EncodedImages, store: Store, runner: Runner, log: Log
    ) -> Curvature:
        if self._taken is not None:
            return self._taken
        if self.form == "identity":
            return Identity()
        names = list(select_weights(model.denoiser, self.weights))
        if self.fisher_path is not None:
            load = load_ekfac if self.form == "ekfac" else load_diagonal
            curvature: Curvature = load(Path(self.fisher_path), model, self.curvature_from, self.damping)
            curvature.check(names, f"The curvature in {self.fisher_path}")
            return curvature
        if self.form == "ekfac":
            log(
                ekfac_plan(
                    model,
                    data=data,
                    names=names,
                    settings=self.fisher,
                    layers_per_pass=self.layers_per_pass,
                    store=store,
                    world_size=runner.world_size,
                )
            )
            return fit_ekfac(
                model,
                data=data,
                names=names,
                store=store,
                runner=runner,
                settings=self.fisher,
                damping=self.damping,
                layers_per_pass=self.layers_per_pass,
                progress=self.progress,
            )
        log(f"Fisher information of {self.weights} over {len(data):,} training images")
        return fit_diagonal(
            model,
            data=data,
            names=names,
            store=store,
            runner=runner,
            settings=self.fisher,
            damping=self.damping,
            progress=self.progress,
        )

    def query_latent(self, query: Query) -> QueryLatent:
        """The query as the model sees it: see `as_latent`."""
        return as_latent(self.ready()[0], query)

    def reference(
        self, change: Float[Tensor, "n f k t r *q"], chosen: Sequence[int], measure: Callable[[list[int]], Tensor]
    ) -> Float[Tensor, "m f k t r *q"]:
        """Changes of the images that decide the timesteps' weights: the same ones whatever the candidates are.

        Args:
            change: The candidates' changes.
            chosen: The candidates' positions in the training set.
            measure: Measures the changes of training images at these positions.
        """
        if self.timestep_weights == "equal":
            return change[:0]
        wanted, row_of = self.ready()[1].sample(_REFERENCE), {position: row for row, position in enumerate(chosen)}
        if all(position in row_of for position in wanted):
            return change[[row_of[position] for position in wanted]]
        return measure(wanted)

    def weigh(self, reference: Float[Tensor, "m f k t r"]) -> Float[Tensor, "t 1"]:
        """What each timestep's changes are multiplied by."""
        if self.timestep_weights == "equal":
            return torch.ones(reference.shape[3], 1, dtype=reference.dtype)
        return spread_weights(reference).to(reference.dtype)[:, None]

    def parts(self, change: Float[Tensor, "n f k t r"]) -> dict[str, Float[NDArray[np.float64], " n"]]:
        """Scores by part of the grid; see `Breakdown`."""
        return self.breakdown.parts(change, self.grid.steps(self.ready()[0].noise_schedule.steps), self.flip)

    def reliability(self, change: Float[Tensor, "n f k t r"]) -> float:
        """Split-half reliability of the scores over the (t, ε) draws; NaN with a single draw."""
        noise_samples = change.double().mean(dim=2).flatten(2)

        def score(part: Int64[NDArray[np.int64], " h"]) -> Float[NDArray[np.float64], " n"]:
            return reduce_losses(noise_samples[:, :, None, torch.from_numpy(part), None], self.flip).numpy()

        return split_half(score, noise_samples.shape[2], self.grid.seed)
