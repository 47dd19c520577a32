"""Muon for a whole network: orthogonalised momentum for its matrices and kernels, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """One optimizer of two, with one learning rate.

    Weights of linear layers, and convolution kernels as matrices (out, in · height · width), are stepped by
    `torch.optim.Muon` (Jordan et al. 2024) with steps as large as AdamW's (Liu et al. 2025, "Muon is scalable for LLM
    training", section 2.2), so that a learning rate found for AdamW serves. Biases, norms and what has fewer than
    `min_side` rows or columns are stepped by AdamW.

    Args:
        params: The parameters.
        lr: Learning rate.
        momentum: Muon's.
        betas: AdamW's.
        weight_decay: Of all parameters.
        min_side: Smallest side of a matrix that is orthogonalised.

    Raises:
        ValueError: A parameter has another number of dimensions than 1, 2 or 4.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        min_side: int = 16,
    ) -> None:
        given = list(params)
        super().__init__([{"params": given}], {"lr": lr})
        odd = [tuple(each.shape) for each in given if each.dim() not in (1, 2, 4)]
        if odd:
            raise ValueError(f"MuonAdamW steps vectors, matrices and 2-d convolution kernels; given one of {odd[0]}.")
        large = [each.dim() > 1 and min(each.shape[0], each[0].numel()) >= min_side for each in given]
        self._matrices = [each for each, is_large in zip(given, large, strict=True) if is_large]
        self._views = [nn.Parameter(_as_matrix(each.data)) for each in self._matrices]
        rest = [each for each, is_large in zip(given, large, strict=True) if not is_large]
        self._inner: dict[str, Optimizer] = {}
        if self._views:
            scale = "match_rms_adamw"
            self._inner["muon"] = Muon(self._views, lr, weight_decay, momentum, adjust_lr_fn=scale)
        if rest:
            self._inner["adamw"] = AdamW(rest, lr, betas, weight_decay=weight_decay, fused=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step; what has no gradient stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for weight, view in zip(self._matrices, self._views, strict=True):
            # Each time anew: a module may have been moved since.
            view.data = _as_matrix(weight.data)
            view.grad = None if weight.grad is None else _as_matrix(weight.grad, weight.data)
        for inner in self._inner.values():
            inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            inner.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Of both, and of what schedules set."""
        return {**super().state_dict(), "inner": {name: inner.state_dict() for name, inner in self._inner.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state."""
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "inner"})
        for name, inner in self._inner.items():
            inner.load_state_dict(state_dict["inner"][name])


def _as_matrix(weight: Tensor, like: Tensor | None = None) -> Tensor:
    """(out, everything else) without a copy; the order of the columns does not matter to Muon, but must be one."""
    layout = weight if like is None else like
    if layout.dim() == 4 and not layout.is_contiguous():
        weight = weight.permute(0, 2, 3, 1)  # channels last
    return weight.reshape(weight.shape[0], -1) if like is not None else weight.view(weight.shape[0], -1)
