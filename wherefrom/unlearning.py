"""Unlearning a synthesized image: gradient ascent on its loss, preconditioned or plain (AbU.

Section 3.2 and appendix A).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.optim import Optimizer

from wherefrom import keyed
from wherefrom.curvature.base import Curvature, Identity
from wherefrom.diffusion import DiffusionModel
from wherefrom.runner import Runner
from wherefrom.step_size import alpha_for_rise
from wherefrom.weights import Subset, restored, select_weights, trainable

_TIME, _GRADIENT, _MEASURE = 401, 402, 403


class NewtonAscent(Optimizer):
    """θ ← θ + (α/N) · F⁻¹ g, or with the pull of the second term θ + (α/N) · F⁻¹ g - α (θ - θ₀).

    AbU, section 3.2 and appendix A.2.

    Args:
        named_params: (name, parameter) pairs; the names are those that the curvature knows.
        curvature: F.
        lr: α.
        dataset_size: N, the number of training images.
        pull: Keep the pull towards the pretrained weights, which the paper drops.

    Raises:
        ValueError: `lr` is negative or `dataset_size` not positive.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        curvature: Curvature,
        lr: float = 0.01,
        dataset_size: int = 1,
        pull: bool = False,
    ) -> None:
        if lr < 0 or dataset_size < 1:
            raise ValueError(
                f"lr must not be negative and dataset_size must be positive; given {lr} and {dataset_size}."
            )
        super().__init__(list(named_params), {"lr": lr})
        self.curvature, self.dataset_size, self.pull = curvature, dataset_size, pull
        if pull:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["pretrained"] = parameter.detach().clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step up the gradients that the parameters hold.

        Raises:
            ValueError: A preconditioned gradient is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        named = [
            pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
        ]
        self.ascend({name: parameter.grad for name, parameter in named if parameter.grad is not None})
        return loss

    @torch.no_grad()
    def ascend(self, gradients: Mapping[str, Tensor]) -> None:
        """One step up these gradients, given by name.

        Raises:
            ValueError: A preconditioned gradient is not finite.
        """
        updates = self.updates(gradients)
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if name in updates:
                    parameter.add_(updates[name], alpha=group["lr"])

    @torch.no_grad()
    def updates(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What α multiplies in a step up these gradients: where the weights go, with α = 1.

        Raises:
            ValueError: A preconditioned gradient is not finite.
        """
        directions = self.curvature.precondition(gradients)
        found = {}
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if name in directions:
                    found[name] = directions[name] / self.dataset_size
                    if self.pull:
                        found[name] -= parameter - self.state[parameter]["pretrained"]
        return found


class SGDAscent(NewtonAscent):
    """θ ← θ + α g: the ablation without curvature (AbU, section 5.3).

    Args:
        named_params: (name, parameter) pairs.
        lr: α.
    """

    def __init__(self, named_params: Iterable[tuple[str, nn.Parameter]], lr: float = 0.01) -> None:
        super().__init__(named_params, Identity(), lr)


@dataclass(frozen=True)
class UnlearningSettings:
    """How a query is unlearned.

    Attributes:
        steps: Number of steps.
        draws: (t, ε) draws of which each step's gradient is the mean; AbU takes 50,000.
        rise: Choose α so that the query's loss rises by this share over all steps (ours: α itself does not transfer
            between models).
        alpha: α itself; instead of `rise`.
        newton: Precondition with the curvature; False is the SGD ablation.
        pull: Keep the pull towards the pretrained weights.
        measure_draws: Draws on which the rise is measured.
        seed: Seed of all draws.
    """

    steps: int = 1
    draws: int = 2000
    rise: float | None = 0.2
    alpha: float | None = None
    newton: bool = True
    pull: bool = False
    measure_draws: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rise is None) == (self.alpha is None):
            raise ValueError(
                f"Give either rise or alpha, and null for the other; given rise={self.rise} and alpha={self.alpha}."
            )
        if self.steps < 1 or self.draws < 1 or self.measure_draws < 1:
            raise ValueError("steps, draws and measure_draws must be at least 1.")
        if self.rise is not None and self.rise <= 0:
            raise ValueError(f"rise must be positive (0.2 is 20 %); given {self.rise}.")
        if self.alpha is not None and self.alpha < 0:
            raise ValueError(f"alpha must not be negative: unlearning ascends; given {self.alpha}.")


@dataclass(frozen=True)
class QueryLatent:
    """A query as the diffusion model sees it.

    Attributes:
        id: Its id.
        latent: The scaled latent (C, H, W).
        states: Token states of its prompt (L, D).
        weights: Share of each latent cell that is inside the region asked for; None is the whole picture.
    """

    id: str
    latent: Float[Tensor, "c h w"]
    states: Float[Tensor, "l d"]
    weights: Float[Tensor, "h w"] | None = None

    @property
    def key(self) -> int:
        """Hash of the id."""
        return keyed.hash_text(self.id)


@dataclass(frozen=True)
class Unlearned:
    """What unlearning a query gives.

    Attributes:
        moved: New values of the weights that moved.
        alphas: α of each step.
        losses: The query's loss before the first step and after each.
        gradient_s: Seconds that the gradients took.
    """

    moved: dict[str, Tensor]
    alphas: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_s: float = 0.0

    @property
    def rise(self) -> float:
        """Relative rise of the query's loss."""
        return self.losses[-1] / self.losses[0] - 1.0


class QueryLoss:
    """L(ẑ; θ) over keyed draws of timestep and noise: its value and its gradient.

    Draws are keyed by (seed, query id, step, draw index), and a step's timesteps follow a golden-ratio sequence, so
    they cover the schedule evenly without ever being the same in two steps.

    Args:
        model: The model.
        query: The query.
        seed: Seed of the draws.
        runner: This process's place; processes share the draws.
        batch_size: Draws at a time.
    """

    def __init__(
        self, model: DiffusionModel, query: QueryLatent, seed: int, runner: Runner, batch_size: int = 128
    ) -> None:
        self.model, self.query, self.seed, self.runner, self.batch_size = model, query, seed, runner, batch_size

    def _batches(self, salt: int, step: int, draws: int) -> Iterable[Float[Tensor, "b"]]:
        model, device = self.model, self.model.device
        for first in range(self.runner.rank * self.batch_size, draws, self.runner.world_size * self.batch_size):
            draw = torch.arange(first, min(first + self.batch_size, draws))
            latent, timesteps, keys = self.at(salt, step, draw)
            noise = keyed.normal(keys.to(device), latent.shape, model.dtype)
            latents = latent.to(device, model.dtype).expand_as(noise)
            states = self.query.states.to(device, model.dtype).expand(len(draw), -1, -1)
            yield model.losses(latents, states, timesteps.to(device), noise, self.query.weights)

    def at(self, salt: int, step: int, draw: Int64[Tensor, "b"]) -> tuple[Tensor, Tensor, Tensor]:
        """The latent whose loss is taken, and the timesteps and noise keys of some draws."""
        base = keyed.combine(salt, self.seed, self.query.key, step)
        start = float(keyed.uniform(keyed.combine(_TIME, base))[0])
        time = torch.remainder(start + draw * 0.6180339887498949, 1.0)
        return self.query.latent, (time * self.model.process.steps).long(), keyed.combine(base, draw)

    @torch.no_grad()
    def value(self, draws: int) -> float:
        """Mean loss over draws that are the same at every call, so that two weights can be compared."""
        total = torch.zeros((), dtype=torch.float64)
        for losses in self._batches(_MEASURE, 0, draws):
            total += losses.double().sum().cpu()
        return float(self.runner.sum(total.to(self.model.device))) / draws

    def gradient(self, parameters: Mapping[str, nn.Parameter], step: int, draws: int) -> dict[str, Tensor]:
        """∇L(ẑ; θ) with respect to the parameters, over this step's draws."""
        totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for losses in self._batches(_GRADIENT, step, draws):
            for total, gradient in zip(
                totals.values(), torch.autograd.grad(losses.sum(), list(parameters.values())), strict=True
            ):
                total += gradient
        return {name: self.runner.sum(total) / draws for name, total in totals.items()}


class Unlearner:
    """Unlearns one query step by step, in the model's own weights; `unlearn` is the usual way to run it.

    Args:
        model: The pretrained model.
        query: The synthesized image and its prompt.
        weights: Which weights move.
        curvature: F; not used where `settings.newton` is False.
        dataset_size: N.
        settings: How to unlearn.
        runner: This process's place.
        batch_size: Draws at a time; does not change the result.

    Raises:
        ValueError: The query's loss is not finite.
    """

    def __init__(
        self,
        model: DiffusionModel,
        query: QueryLatent,
        weights: Subset,
        curvature: Curvature,
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
        value = self.loss.value(self.settings.measure_draws)
        if not math.isfinite(value):
            raise ValueError(
                f"The loss of query {self.query.id!r} is {value} after step {len(self.alphas)} of unlearning. "
                "Choose a smaller alpha, or a "
                "rise, which cannot overshoot."
            )
        self.losses.append(value)

    def step(self) -> None:
        """One step of ascent.

        Raises:
            ValueError: The loss or the step is not finite, or no α gives the rise.
        """
        started = time.monotonic()
        with trainable(self.model.denoiser, self.parameters):
            gradients = self.loss.gradient(self.parameters, len(self.alphas), self.settings.draws)
        self.gradient_s += time.monotonic() - started
        before, updates = self.values(), self.optimizer.updates(gradients)

        def move(alpha: float) -> None:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(before[name].add(updates[name], alpha=alpha))

        def rise(alpha: float) -> float:
            move(alpha)
            return self.loss.value(self.settings.measure_draws) / self.losses[-1] - 1.0

        alpha = self.settings.alpha
        if alpha is None:
            assert self.settings.rise is not None
            target = (1.0 + self.settings.rise) ** (1.0 / self.settings.steps) - 1.0
            slope = sum(float((gradients[name].double() * updates[name].double()).sum()) for name in updates)
            linear = target * self.losses[-1] / slope if slope > 0 else 0.0
            alpha = alpha_for_rise(rise, target, linear)
        move(alpha)
        self.alphas.append(alpha)
        self._measure()

    def values(self) -> dict[str, Tensor]:
        """A copy of the weights as they are now."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def unlearn(
    model: DiffusionModel,
    query: QueryLatent,
    weights: Subset,
    curvature: Curvature,
    dataset_size: int,
    settings: UnlearningSettings,
    runner: Runner,
    batch_size: int = 128,
) -> Unlearned:
    """Unlearns one query and returns the moved weights; the model is left as it was. Arguments: see `Unlearner`.

    Raises:
        ValueError: The query's loss or a step is not finite, or no α gives the rise.
    """
    with restored(select_weights(model.denoiser, weights)):
        work = Unlearner(model, query, weights, curvature, dataset_size, settings, runner, batch_size)
        for _ in range(settings.steps):
            work.step()
        return Unlearned(work.values(), work.alphas, work.losses, work.gradient_s)
