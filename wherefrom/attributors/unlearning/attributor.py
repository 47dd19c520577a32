"""Attribution by unlearning (AbU): unlearn the query, and measure the loss change of each training image."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wherefrom.attributors.compute_estimate import ComputeEstimate
from wherefrom.attributors.preconditioned import PreconditionedAttributor
from wherefrom.attributors.unlearning.unlearner import Unlearned, UnlearningSettings, unlearn
from wherefrom.curvature import Curvature, DiagonalFisher, Identity
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossGrid, measure_losses
from wherefrom.gradients.score_reduction import Breakdown, Flip, TimestepWeights, reduce_losses
from wherefrom.models.diffusion import DiffusionModel, Output, check_output, with_output
from wherefrom.models.parameter_subsets import Subset, moved_weights
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.stable_names import settings_identity
from wherefrom.runtime.tensor_hash import hash_tensors


class AttributionByUnlearning(PreconditionedAttributor):
    """Attribution by unlearning (AbU; Wang et al. 2024, sections 3.2 and 3.3).

    The score of a training image z is its loss change, τ(ẑ, z) = L(z; θ′) - L(z; θ₀), where θ₀ are the pretrained
    weights and θ′ = θ₀ + (α/N) F⁻¹ ∇L(ẑ; θ₀) those after unlearning the query ẑ by one step (or several) of gradient
    ascent, preconditioned by the curvature F. N is the number of training images; α is set, or found by a line search
    for a given relative increase of the query's loss.

    Images that training sees wᵢ times weigh wᵢ-fold in F, and N = Σ wᵢ. The score itself is not multiplied by wᵢ: it is
    a loss of the image, which is the same for each of its copies, and not a share of an effect that adds up. That the
    image was seen often is in it already, as θ₀ has fitted it better.

    `fit` computes F and the losses L(z; θ₀) on the grid, shape (N, F, K, T, R); both are cached. A query costs its
    gradient and the losses of all training images again.

    Args:
        weights: Parameters that unlearning changes.
        unlearning: How the query is unlearned.
        grid: Timesteps and noise samples at which training losses are measured.
        flip: How the scores of an image and of its mirror image are combined.
        curvature: Estimator of F of the Newton step: `DiagonalFisher` is AbU, `EKFAC` is AbU+ (Fast Data Attribution,
            section 3). Not used where `unlearning.newton` is False.
        batch_size: Forward passes at a time; does not change the result.
        breakdown: Which parts of the scores (timestep bands, captions) are reported beside them.
        timestep_weights: `equal` takes the plain mean over timesteps, as the papers do; `spread` (ours) divides each
            timestep's changes by their spread (median absolute deviation) over 256 training images, so that no timestep
            dominates the others.
        step_output: Objective that the ascent increases: the query's loss, or the model's mean squared output, as in
            D-TRAK (AbU's third open question). `unlearning.relative_loss_increase` refers to the same objective.
        score_output: Function of a training image whose change is the score: its loss, or the mean squared output.

    Raises:
        ValueError: An output or the timesteps' weights are unknown, or there are more timestep bands than timesteps.
    """

    def __init__(
        self,
        weights: Subset = "cross_attention_kv",
        *,
        unlearning: UnlearningSettings = UnlearningSettings(),
        grid: LossGrid = LossGrid(),
        flip: Flip = "max",
        curvature: Curvature = DiagonalFisher(),
        batch_size: int = 256,
        breakdown: Breakdown = Breakdown(),
        timestep_weights: TimestepWeights = "spread",
        step_output: Output = "loss",
        score_output: Output = "loss",
    ) -> None:
        super().__init__(
            weights,
            curvature=curvature if unlearning.newton else Identity(recorded=curvature),
            grid=grid,
            flip=flip,
            batch_size=batch_size,
            breakdown=breakdown,
            timestep_weights=timestep_weights,
        )
        for output in (step_output, score_output):
            check_output(output)
        self.unlearning = unlearning
        self.step_output: Output = step_output
        self.score_output: Output = score_output

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {
            "method": "attribution by unlearning",
            "unlearning": settings_identity(self.unlearning),
            "step_output": self.step_output,
            "score_output": self.score_output,
            **super().identity(),
        }

    def estimate(self, data: TrainingData, queries: int) -> ComputeEstimate:
        """Forward passes of the losses, and three for each sample of the curvature and of the query's gradient."""
        assert data.latents is not None
        losses, curvature = self.grid_passes(data), self.curvature_passes(data)
        gradient = self.unlearning.steps * (3 * self.unlearning.noise_samples + 6 * self.unlearning.measurement_samples)
        latents = data.latents.held_bytes
        return ComputeEstimate(losses + curvature, losses + gradient, 4 * losses * (1 + queries), latents + 8 * losses)

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Fits the curvature and measures the losses before unlearning, once per model."""
        _, latents = self.prepare(data, model, store, runner, log)
        log(f"losses of {len(latents):,} training images before unlearning")
        started = time.monotonic()
        self.before = self._losses(latents, None)
        empty = torch.zeros((0, *self.before.shape[1:]), dtype=self.before.dtype)
        self.null_before = self._losses(data.held_out_latents, None) if data.held_out_latents is not None else empty
        self.fit_s = {**self.fit_s, "losses": time.monotonic() - started}

    def _losses(self, data: EncodedImages, moved: Unlearned | None, weights: str | None = None) -> Tensor:
        pretrained, _, _, store, runner = self.ready()
        model = with_output(pretrained, self.score_output)
        with moved_weights(model.denoiser, {} if moved is None else moved.moved):
            return measure_losses(
                model,
                data=data,
                grid=self.grid,
                store=store,
                runner=runner,
                batch_size=self.batch_size,
                weights=weights,
                progress=self.progress,
            )

    def _change(self, positions: list[int], unlearned: Unlearned, name: str) -> Tensor:
        """Loss changes of the training images at these positions."""
        return self._losses(self.ready()[1].subset(positions), unlearned, name) - self.before[positions]

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """One query at a time: unlearn, measure the losses again, take the difference."""
        model, data, held_out, _, runner = self.ready()
        chosen = self.positions(data.ids, candidates)
        part = data if candidates is None else data.subset(chosen)
        stepped, scored = (with_output(model, output) for output in (self.step_output, self.score_output))
        pretrained = scored.fingerprint()
        raised = {"loss": "query_loss", "square_output": "query_square_output"}[self.step_output]
        for query in queries:
            started = time.monotonic()
            unlearned = unlearn(
                stepped,
                query=self.query_latent(query),
                weights=self.weights,
                curvature=self.curvature_matrix,
                dataset_size=data.seen,
                settings=self.unlearning,
                runner=runner,
            )
            unlearn_s = time.monotonic() - started
            # The name includes the pretrained fingerprint because the unchanged weights determine the losses too.
            name = f"{pretrained} moved to {hash_tensors(unlearned.moved)}"
            change = self._losses(part, unlearned, name) - self.before[chosen]
            null = torch.zeros((0, *change.shape[1:]))
            if held_out is not None:
                null = self._losses(held_out, unlearned, name) - self.null_before
            measure = partial(self._change, unlearned=unlearned, name=name)
            weights = self.timestep_factors(self.reference_changes(change, chosen, measure))
            change, null = change * weights, null * weights
            yield Scores(
                query,
                part.ids,
                reduce_losses(change, self.flip).numpy(),
                reduce_losses(null, self.flip).numpy(),
                {
                    "split_half_reliability": self.reliability(change),
                    raised: unlearned.losses[0],
                    f"{raised}_rise": unlearned.relative_loss_increase,
                    "alpha": unlearned.alphas[0],
                    "unlearning_s": unlearn_s,
                    "gradient_s": unlearned.gradient_s,
                    "losses_s": time.monotonic() - started - unlearn_s,
                },
                self.parts(change),
            )
