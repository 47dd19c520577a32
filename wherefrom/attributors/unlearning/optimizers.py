"""Optimizers of unlearning: gradient ascent, preconditioned by a curvature or plain (AbU, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wherefrom.curvature.base import CurvatureMatrix, IdentityMatrix


class NewtonAscent(Optimizer):
    """Preconditioned gradient ascent: θ ← θ + (α/N) · F⁻¹ g (AbU, section 3.2 and appendix A.2).

    With `pull`, θ ← θ + (α/N) · F⁻¹ g - α (θ - θ₀): the second term, which the paper derives and then drops, is the
    elastic (EWC) penalty that keeps the weights near the pretrained θ₀. It is zero at the first step.

    Args:
        named_params: (name, parameter) pairs; the names must match those in the curvature.
        curvature: F, fitted.
        lr: α.
        dataset_size: N, the number of training images.
        pull: Include the term -α (θ - θ₀).

    Raises:
        ValueError: `lr` is negative or `dataset_size` not positive.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        curvature: CurvatureMatrix,
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
        """One ascent step along the gradients that the parameters hold.

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
        """One ascent step along these gradients, given by name.

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
        """Updates of a step along these gradients for α = 1, by parameter name.

        Raises:
            ValueError: A preconditioned gradient is not finite.
        """
        directions = self.curvature.precondition(gradients)
        result = {}
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if name in directions:
                    result[name] = directions[name] / self.dataset_size
                    if self.pull:
                        result[name] -= parameter - self.state[parameter]["pretrained"]
        return result


class SGDAscent(NewtonAscent):
    """θ ← θ + α g: the ablation without curvature (AbU, section 5.3).

    Args:
        named_params: (name, parameter) pairs.
        lr: α.
    """

    def __init__(self, named_params: Iterable[tuple[str, nn.Parameter]], lr: float = 0.01) -> None:
        super().__init__(named_params, IdentityMatrix(), lr)
