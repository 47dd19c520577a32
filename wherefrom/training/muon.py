"""Muon for a whole network: orthogonalised momentum for matrices and kernels, AdamW for all other parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

# Coefficients and number of the Newton-Schulz iterations of Jordan et al. 2024, "Muon".
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
SMALLEST_NORM = 1e-7


class MuonAdamW(Optimizer):
    """Muon and AdamW combined, with one learning rate.

    Weights of linear layers, and convolution kernels as matrices (out, in · height · width), are updated by Muon
    (Jordan et al. 2024; Nesterov momentum) with steps as large as AdamW's (Liu et al. 2025, "Muon is scalable for LLM
    training", section 2.2), so that a learning rate tuned for AdamW carries over. Biases, norms and matrices with fewer
    than `min_side` rows or columns are updated by AdamW. Unlike `torch.optim.Muon`, which updates matrices one by one
    in bfloat16, this orthogonalises all matrices of one shape together in float32.

    Args:
        params: The parameters.
        lr: Learning rate.
        momentum: Momentum of Muon.
        betas: Betas of AdamW.
        weight_decay: Weight decay of all parameters.
        min_side: Smallest side of a matrix that is orthogonalised.

    Raises:
        ValueError: A parameter has another number of dimensions than 1, 2 or 4.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        min_side: int = 16,
    ) -> None:
        given = list(params)
        odd = [tuple(each.shape) for each in given if each.dim() not in (1, 2, 4)]
        if odd:
            raise ValueError(f"MuonAdamW steps vectors, matrices and 2-d convolution kernels; given one of {odd[0]}.")
        super().__init__([{"params": given}], {"lr": lr})
        self.momentum, self.weight_decay = momentum, weight_decay
        large = [each.dim() > 1 and min(each.shape[0], each[0].numel()) >= min_side for each in given]
        self._matrices = [each for each, is_large in zip(given, large, strict=True) if is_large]
        rest = [each for each, is_large in zip(given, large, strict=True) if not is_large]
        self._adamw = AdamW(rest, lr, betas, weight_decay=weight_decay, fused=True) if rest else None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step; parameters without a gradient are unchanged."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lr = self.param_groups[0]["lr"]
        self._step_matrices(lr)
        if self._adamw is not None:
            self._adamw.param_groups[0]["lr"] = lr
            self._adamw.step()
        return loss

    def _step_matrices(self, lr: float) -> None:
        pairs = [(each, each.grad) for each in self._matrices if each.grad is not None]
        if not pairs:
            return
        moved: list[Tensor] = [weight for weight, _ in pairs]
        grads: list[Tensor] = [gradient for _, gradient in pairs]
        for each in moved:
            if "momentum" not in self.state[each]:
                self.state[each]["momentum"] = torch.zeros_like(each)
        buffers = [self.state[each]["momentum"] for each in moved]
        torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
        directions = torch._foreach_lerp(grads, buffers, self.momentum)
        if self.weight_decay:
            torch._foreach_mul_(moved, 1 - lr * self.weight_decay)
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight, direction in zip(moved, directions, strict=True):
            view, matrix = _as_matrix(weight.data), _as_matrix(direction, weight.data)
            if matrix.shape[0] > matrix.shape[1]:
                view, matrix = view.mT, matrix.mT
            alike[matrix.shape[0], matrix.shape[1]].append((view, matrix))
        for shape, members in alike.items():
            stacked = orthogonalise(torch.stack([matrix for _, matrix in members]).float())
            step = lr * 0.2 * math.sqrt(max(shape))
            for (view, _), update in zip(members, stacked, strict=True):
                view.add_(update, alpha=-step)

    def state_dict(self) -> dict[str, Any]:
        """State of both optimizers, with the learning rate that schedules set."""
        inner = None if self._adamw is None else self._adamw.state_dict()
        return {**super().state_dict(), "adamw": inner}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state.

        Raises:
            ValueError: The state was not written by this release of the optimizer.
        """
        if "adamw" not in state_dict:
            raise ValueError(
                "The optimizer's state is not one that MuonAdamW wrote in this release. Train again from the start: "
                "remove the checkpoint."
            )
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "adamw"})
        if self._adamw is not None:
            self._adamw.load_state_dict(state_dict["adamw"])


def orthogonalise(matrices: Float[Tensor, "n rows columns"]) -> Float[Tensor, "n rows columns"]:
    """Orthogonalises matrices by Newton-Schulz iterations (Muon): same singular vectors, singular values near 1.

    For wide matrices it iterates on the smaller square side only: X ↦ aX + bXXᵀX + c(XXᵀ)²X multiplies X from the left
    by a polynomial of its Gram matrix, and all these polynomials commute. That takes 4 rows² columns + 40 rows³
    operations instead of 20 rows² columns + 10 rows³.

    Args:
        matrices: At most as many rows as columns.
    """
    norms: Tensor = torch.linalg.matrix_norm(matrices, keepdim=True)
    x = matrices / norms.clamp(min=SMALLEST_NORM)
    if x.shape[-1] < 2 * x.shape[-2]:
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=CUBIC, alpha=QUINTIC), x, beta=LINEAR)
        return x
    gram = x @ x.mT
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    product = eye.expand_as(gram)
    for _ in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=CUBIC, alpha=QUINTIC) + LINEAR * eye
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x


def _as_matrix(weight: Tensor, like: Tensor | None = None) -> Tensor:
    """Reshapes to (out, everything else) without a copy; the order of columns is arbitrary but consistent."""
    layout = weight if like is None else like
    if layout.dim() == 4 and not layout.is_contiguous():
        weight = weight.permute(0, 2, 3, 1)  # channels last
    return weight.reshape(weight.shape[0], -1) if like is not None else weight.view(weight.shape[0], -1)
