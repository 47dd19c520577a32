"""Unlearning a synthesized image: gradient ascent on its loss, preconditioned or plain (AbU, section 3.2)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wherefrom.attributors.unlearning.optimizers import NewtonAscent, SGDAscent
from wherefrom.attributors.unlearning.step_size import alpha_for_increase
from wherefrom.curvature.base import CurvatureMatrix
from wherefrom.gradients.query_loss import QueryLatent, QueryLoss
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset, restored, select_weights, trainable
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.ranges import check_ranges


@dataclass(frozen=True)
class UnlearningSettings:
    """How a query is unlearned.

    Attributes:
        steps: Number of steps.
        noise_samples: Number of (t, ε) samples over which each step's gradient is averaged; AbU takes 50,000.
        relative_loss_increase: Choose α by a line search so that L(ẑ; θ′) / L(ẑ; θ₀) - 1 after all steps is this
            number (ours: a value of α does not transfer between models).
        alpha: α itself; instead of `relative_loss_increase`.
        newton: Precondition with the curvature; False is the SGD ablation.
        pull: Include the penalty towards the pretrained weights, see `NewtonAscent`.
        measurement_samples: Number of (t, ε) samples over which the query's loss is averaged in the line search.
        seed: Seed of all noise samples.
    """

    steps: int = 1
    noise_samples: int = 2000
    relative_loss_increase: float | None = 0.2
    alpha: float | None = None
    newton: bool = True
    pull: bool = False
    measurement_samples: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.relative_loss_increase is None) == (self.alpha is None):
            raise ValueError(
                "Give either relative_loss_increase or alpha, and null for the other; given "
                f"relative_loss_increase={self.relative_loss_increase} and alpha={self.alpha}."
            )
        check_ranges(
            steps=self.steps,
            noise_samples=self.noise_samples,
            relative_loss_increase=self.relative_loss_increase,
            alpha=self.alpha,
            measurement_samples=self.measurement_samples,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Unlearned:
    """Weights after unlearning a query, with the step sizes and losses of the way there.

    Attributes:
        moved: New values of the selected weights, by parameter name.
        alphas: α of each step.
        losses: The query's loss before the first step and after each.
        gradient_s: Seconds that the gradients took.
    """

    moved: dict[str, Tensor]
    alphas: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_s: float = 0.0

    @property
    def relative_loss_increase(self) -> float:
        """L(ẑ; θ′) / L(ẑ; θ₀) - 1."""
        return self.losses[-1] / self.losses[0] - 1.0


class Unlearner:
    """Unlearns one query step by step, in the model's own weights; `unlearn` is the usual way to run it.

    Args:
        model: The pretrained model.
        query: The synthesized image and its prompt.
        weights: Parameters that unlearning changes.
        curvature: F, fitted; not used where `settings.newton` is False.
        dataset_size: N, the number of training images.
        settings: How to unlearn.
        runner: Rank and world size of this process.
        batch_size: Noise samples at a time; does not change the result.

    Raises:
        ValueError: The query's loss is not finite.
    """

    def __init__(
        self,
        model: DiffusionModel,
        *,
        query: QueryLatent,
        weights: Subset,
        curvature: CurvatureMatrix,
        dataset_size: int,
        settings: UnlearningSettings,
        runner: Runner,
        batch_size: int = 128,
    ) -> None:
        self.model, self.query, self.settings = model, query, settings
        self.parameters = select_weights(model.denoiser, weights)
        self.loss = QueryLoss(model, query, settings.seed, runner, batch_size)
        self.optimizer: NewtonAscent = (
            NewtonAscent(self.parameters.items(), curvature, 0.0, dataset_size, settings.pull)
            if settings.newton
            else SGDAscent(self.parameters.items(), 0.0)
        )
        self.alphas: list[float] = []
        self.losses: list[float] = []
        self.gradient_s = 0.0
        self._measure()

    def _measure(self) -> None:
        value = self.loss.value(self.settings.measurement_samples)
        if not math.isfinite(value):
            raise ValueError(
                f"The loss of query {self.query.id!r} is {value} after step {len(self.alphas)} of unlearning. "
                "Choose a smaller alpha, or relative_loss_increase, which cannot overshoot."
            )
        self.losses.append(value)

    def step(self) -> None:
        """One step of ascent.

        Raises:
            ValueError: The loss or the step is not finite, or no α reaches the increase.
        """
        started = time.monotonic()
        with trainable(self.model.denoiser, self.parameters):
            gradients = self.loss.gradient(self.parameters, len(self.alphas), self.settings.noise_samples)
        self.gradient_s += time.monotonic() - started
        before, updates = self.values(), self.optimizer.updates(gradients)

        def move(alpha: float) -> None:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(before[name].add(updates[name], alpha=alpha))

        def relative_loss_increase(alpha: float) -> float:
            move(alpha)
            return self.loss.value(self.settings.measurement_samples) / self.losses[-1] - 1.0

        alpha = self.settings.alpha
        if alpha is None:
            assert self.settings.relative_loss_increase is not None
            target = (1.0 + self.settings.relative_loss_increase) ** (1.0 / self.settings.steps) - 1.0
            slope = sum(float((gradients[name].double() * updates[name].double()).sum()) for name in updates)
            linear = target * self.losses[-1] / slope if slope > 0 else 0.0
            alpha = alpha_for_increase(relative_loss_increase, target, linear)
        move(alpha)
        self.alphas.append(alpha)
        self._measure()

    def values(self) -> dict[str, Tensor]:
        """A copy of the weights as they are now."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def unlearn(
    model: DiffusionModel,
    *,
    query: QueryLatent,
    weights: Subset,
    curvature: CurvatureMatrix,
    dataset_size: int,
    settings: UnlearningSettings,
    runner: Runner,
    batch_size: int = 128,
) -> Unlearned:
    """Unlearns one query and returns the moved weights; the model is left as it was. Arguments: see `Unlearner`.

    Raises:
        ValueError: The query's loss or a step is not finite, or no α reaches the increase.
    """
    with restored(select_weights(model.denoiser, weights)):
        unlearner = Unlearner(
            model,
            query=query,
            weights=weights,
            curvature=curvature,
            dataset_size=dataset_size,
            settings=settings,
            runner=runner,
            batch_size=batch_size,
        )
        for _ in range(settings.steps):
            unlearner.step()
        return Unlearned(unlearner.values(), unlearner.alphas, unlearner.losses, unlearner.gradient_s)
