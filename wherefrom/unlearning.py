"""Unlearning a synthesized image: gradient ascent on its loss, preconditioned or plain (AbU, section 3.2 and appendix A)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from wherefrom import keyed
from wherefrom.curvature.base import Curvature, Identity
from wherefrom.diffusion import DiffusionModel
from wherefrom.runner import Runner
from wherefrom.weights import Subset, copy_into, moved_weights, select_weights, trainable

_TIME, _GRADIENT, _MEASURE = 401, 402, 403
_RISE_TOLERANCE = 0.01
_MAX_TRIALS = 60


class NewtonAscent(Optimizer):
    """θ ← θ + (α/N) · F⁻¹ g, or, with the pull of the second term, θ + (α/N) · F⁻¹ g - α (θ - θ₀) (AbU, equation 5 and appendix A.2).

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
            raise ValueError(f"lr must not be negative and dataset_size must be positive; given {lr} and {dataset_size}.")
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
        named = [pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)]
        self.ascend({name: parameter.grad for name, parameter in named if parameter.grad is not None})
        return loss

    @torch.no_grad()
    def ascend(self, gradients: Mapping[str, Tensor]) -> None:
        """One step up these gradients, given by name.

        Raises:
            ValueError: A preconditioned gradient is not finite.
        """
        directions = self.curvature.precondition(gradients)
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if name not in directions:
                    continue
                update = directions[name] / self.dataset_size
                if self.pull:
                    update = update - (parameter - self.state[parameter]["pretrained"])
                parameter.add_(update, alpha=group["lr"])


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
        rise: Choose α so that the query's loss rises by this share over all steps (ours: α itself does not transfer between models).
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
            raise ValueError(f"Give either rise or alpha, and null for the other; given rise={self.rise} and alpha={self.alpha}.")
        if self.steps < 1 or self.draws < 1 or self.measure_draws < 1:
            raise ValueError("steps, draws and measure_draws must be at least 1.")
        if self.rise is not None and self.rise <= 0:
            raise ValueError(f"rise must be positive (0.2 is 20 %); given {self.rise}.")


@dataclass(frozen=True)
class QueryLatent:
    """A query as the diffusion model sees it: id, latent (C, H, W) and token states of its prompt (L, D)."""

    id: str
    latent: Float[Tensor, "c h w"]
    states: Float[Tensor, "l d"]

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
    """

    moved: dict[str, Tensor]
    alphas: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def rise(self) -> float:
        """Relative rise of the query's loss."""
        return self.losses[-1] / self.losses[0] - 1.0


class QueryLoss:
    """L(ẑ; θ) over keyed draws of timestep and noise: its value and its gradient.

    Draws are keyed by (seed, query id, step, draw index), and a step's timesteps follow a golden-ratio sequence, so they cover the schedule
    evenly without ever being the same in two steps.

    Args:
        model: The model.
        query: The query.
        seed: Seed of the draws.
        runner: This process's place; processes share the draws.
        batch_size: Draws at a time.
    """

    def __init__(self, model: DiffusionModel, query: QueryLatent, seed: int, runner: Runner, batch_size: int = 128) -> None:
        self.model, self.query, self.seed, self.runner, self.batch_size = model, query, seed, runner, batch_size

    def _batches(self, salt: int, step: int, draws: int) -> Iterable[Float[Tensor, "b"]]:
        model, device = self.model, self.model.device
        base = keyed.combine(salt, self.seed, self.query.key, step)
        start = float(keyed.uniform(keyed.combine(_TIME, base))[0])
        for first in range(self.runner.rank * self.batch_size, draws, self.runner.world_size * self.batch_size):
            draw = torch.arange(first, min(first + self.batch_size, draws))
            timesteps = (torch.remainder(start + draw * 0.6180339887498949, 1.0) * model.process.steps).long().to(device)
            noise = keyed.normal(keyed.combine(base, draw).to(device), self.query.latent.shape, model.dtype)
            latents = self.query.latent.to(device, model.dtype).expand_as(noise)
            states = self.query.states.to(device, model.dtype).expand(len(draw), -1, -1)
            yield model.losses(latents, states, timesteps, noise)

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


def _with_rise(apply: Callable[[float], float], target: float) -> float:
    """The α at which `apply(α)` = target, by doubling and then regula falsi with bisection; apply(0) < target is assumed.

    Raises:
        ValueError: No α reaches the target.
    """
    low, high, value_low = 0.0, 1e-12, -target
    value_high = apply(high) - target
    trials = 0
    while value_high < 0:
        low, value_low = high, value_high
        high *= 8 if value_high < -0.9 * target else 2
        value_high = apply(high) - target
        trials += 1
        if trials > _MAX_TRIALS or value_high != value_high:
            raise ValueError(
                f"No step size raises the query's loss by {target:.1%} (tried up to {high:.3g}). Ask for a smaller rise, or give alpha instead."
            )
    while abs(value_high) > _RISE_TOLERANCE * target and trials < _MAX_TRIALS:
        trials += 1
        secant = low - value_low * (high - low) / (value_high - value_low)
        middle = min(max(secant, low + 0.05 * (high - low)), high - 0.05 * (high - low))
        value = apply(middle) - target
        if abs(value) <= _RISE_TOLERANCE * target:
            return middle
        if value < 0:
            low, value_low = middle, value
        else:
            high, value_high = middle, value
    return high


def unlearn(
    model: DiffusionModel,
    query: QueryLatent,
    weights: Subset,
    curvature: Curvature,
    dataset_size: int,
    settings: UnlearningSettings,
    runner: Runner,
    batch_size: int = 128,
    after_step: Callable[[int, Mapping[str, Tensor]], None] | None = None,
) -> Unlearned:
    """Unlearns one query and returns the moved weights; the model itself is left as it was.

    Args:
        model: The pretrained model.
        query: The synthesized image and its prompt.
        weights: Which weights move.
        curvature: F; not used where `settings.newton` is False.
        dataset_size: N.
        settings: How to unlearn.
        runner: This process's place.
        batch_size: Draws at a time; does not change the result.
        after_step: Called with the step's index and the weights after each step, while they are in the model.

    Raises:
        ValueError: The query's loss or a step is not finite, or no α gives the rise.
    """
    parameters = select_weights(model.denoiser, weights)
    loss = QueryLoss(model, query, settings.seed, runner, batch_size)
    with moved_weights(model.denoiser, {name: parameter.detach().clone() for name, parameter in parameters.items()}):
        optimizer: NewtonAscent = (
            NewtonAscent(parameters.items(), curvature, 0.0, dataset_size, settings.pull)
            if settings.newton
            else SGDAscent(parameters.items(), 0.0)
        )
        losses, alphas = [loss.value(settings.measure_draws)], []
        _check_finite(losses[0], query, 0)
        for step in range(settings.steps):
            with trainable(model.denoiser, parameters):
                gradients = loss.gradient(parameters, step, settings.draws)
            alpha = _take_step(optimizer, parameters, gradients, loss, losses, settings)
            alphas.append(alpha)
            losses.append(loss.value(settings.measure_draws))
            _check_finite(losses[-1], query, step + 1)
            if after_step is not None:
                after_step(step, parameters)
        moved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return Unlearned(moved, alphas, losses)


def _take_step(
    optimizer: NewtonAscent,
    parameters: Mapping[str, nn.Parameter],
    gradients: Mapping[str, Tensor],
    loss: QueryLoss,
    losses: list[float],
    settings: UnlearningSettings,
) -> float:
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def move(alpha: float) -> None:
        copy_into(parameters, before)
        optimizer.param_groups[0]["lr"] = alpha
        optimizer.ascend(gradients)

    if settings.alpha is not None:
        move(settings.alpha)
        return settings.alpha
    assert settings.rise is not None
    share = (1.0 + settings.rise) ** (1.0 / settings.steps) - 1.0

    def rise(alpha: float) -> float:
        move(alpha)
        return loss.value(settings.measure_draws) / losses[-1] - 1.0

    alpha = _with_rise(rise, share)
    move(alpha)
    return alpha


def _check_finite(value: float, query: QueryLatent, step: int) -> None:
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(
            f"The loss of query {query.id!r} is {value} after step {step} of unlearning. Choose a smaller alpha, or a rise, which cannot overshoot."
        )


def settings_identity(settings: UnlearningSettings) -> dict[str, Any]:
    """The settings as they enter an artifact's identity."""
    return {f"unlearning_{name}": value for name, value in vars(settings).items()}
