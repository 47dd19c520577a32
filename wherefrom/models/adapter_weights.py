"""What an adapter adds to a layer's weight, in closed form: LoRA, LoHa, LoKr, whole weights, and DoRA's norm.

Shape letters: O = outputs, I = inputs, R = rank; a convolution's weight is (O, I, height, width).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Callable[[Tensor], Tensor]


class WeightUpdate(Protocol):
    """What an adapter adds to one layer's weight."""

    @property
    def scale(self) -> float:
        """What the product of its tensors is multiplied by, such as α / R."""

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """What is added to a weight of this shape.

        Raises:
            RuntimeError: The tensors do not make such a weight.
        """

    def rows(self, chosen: Rows, shape: tuple[int, ...]) -> WeightUpdate:
        """The update of some rows (outputs) of a weight of this shape."""


def merged_middle(middle: Float[Tensor, "r r h w"], down: Tensor) -> Float[Tensor, "r i h w"]:
    """A convolution of 1 × 1 and the one after it, in low rank (LoCon's Tucker form), as one convolution."""
    return torch.einsum("i j h w, j q -> i q h w", middle, down.flatten(1))


@dataclass(frozen=True)
class LowRank:
    """LoRA: scale · up · down.

    Attributes:
        down: (R, I), a convolution's (R, I, height, width).
        up: (O, R), a convolution's (O, R, 1, 1).
        scale: α / R.
    """

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """See `WeightUpdate`."""
        return (self.scale * (self.up.flatten(1) @ self.down.flatten(1))).reshape(shape)

    def rows(self, chosen: Rows, shape: tuple[int, ...]) -> WeightUpdate:
        """See `WeightUpdate`."""
        return replace(self, up=chosen(self.up))


def _tucker(core: Tensor, out_side: Tensor, in_side: Tensor) -> Tensor:
    return torch.einsum("i j h w, i p, j q -> p q h w", core, out_side, in_side)


def hadamard(parts: Mapping[str, Tensor]) -> Tensor:
    """LoHa's product before its scale (Hyeon-Woo et al. 2022): two low-rank weights, element by element."""
    sides = []
    for side in ("1", "2"):
        out_side, in_side = parts[f"hada_w{side}_a"], parts[f"hada_w{side}_b"]
        core = parts.get(f"hada_t{side}")
        sides.append(out_side @ in_side if core is None else _tucker(core, out_side, in_side))
    return sides[0] * sides[1]


def kronecker(parts: Mapping[str, Tensor]) -> Tensor:
    """LoKr's product before its scale (Yeh et al. 2024): w1 ⊗ w2, each whole or in low rank."""
    left = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        right = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        right = _tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        right = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    return torch.kron(left[:, :, None, None] if right.dim() == 4 else left, right.contiguous())


@dataclass(frozen=True)
class Hadamard:
    """LoHa.

    Attributes:
        parts: By peft's names, which are LyCORIS's: `hada_w1_a`, …
        scale: α / R.
    """

    parts: Mapping[str, Tensor]
    scale: float

    @property
    def rank(self) -> int:
        """R."""
        return int(self.parts["hada_w1_b"].shape[0])

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """See `WeightUpdate`."""
        return (self.scale * hadamard(self.parts)).reshape(shape)

    def rows(self, chosen: Rows, shape: tuple[int, ...]) -> WeightUpdate:
        """See `WeightUpdate`."""
        sides = {name: chosen(self.parts[name]) for name in ("hada_w1_a", "hada_w2_a")}
        return replace(self, parts={**self.parts, **sides})


@dataclass(frozen=True)
class Kronecker:
    """LoKr.

    Attributes:
        parts: By peft's names, which are LyCORIS's: `lokr_w1`, …
        scale: α / R, or 1 where nothing is of low rank.
    """

    parts: Mapping[str, Tensor]
    scale: float

    @property
    def rank(self) -> int | None:
        """R; None where both sides are whole."""
        low = [self.parts[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in self.parts]
        return int(low[0].shape[0]) if low else None

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """See `WeightUpdate`."""
        return (self.scale * kronecker(self.parts)).reshape(shape)

    def rows(self, chosen: Rows, shape: tuple[int, ...]) -> WeightUpdate:
        """See `WeightUpdate`; some rows of a Kronecker product are no Kronecker product."""
        return Whole(chosen(self.delta(shape)))


@dataclass(frozen=True)
class Whole:
    """A whole difference of a weight.

    Attributes:
        difference: Of the weight's own shape.
        scale: 1.
    """

    difference: Tensor
    scale: float = 1.0

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """See `WeightUpdate`."""
        return (self.scale * self.difference).reshape(shape)

    def rows(self, chosen: Rows, shape: tuple[int, ...]) -> WeightUpdate:
        """See `WeightUpdate`."""
        return replace(self, difference=chosen(self.difference))


def decomposed(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA (Liu et al. 2024): the sum of weight and update, brought to a learned norm.

    Trainers take the norm along different axes: peft of each output's weights; LyCORIS of each input's, or of each
    output's where it was told so. The magnitude's shape says which, see `is_norm`.

    Args:
        weight: The layer's weight.
        delta: What the low-rank part adds.
        magnitude: The learned norms.

    Raises:
        ValueError: The magnitude is of neither shape.
    """
    summed = weight + delta
    ones = (1,) * (summed.dim() - 2)
    outputs, inputs = summed.shape[:2]
    if not is_norm(magnitude, tuple(summed.shape)):
        raise ValueError(f"a magnitude of shape {tuple(magnitude.shape)} fits no weight of {tuple(summed.shape)}")
    if magnitude.shape[0] == outputs and magnitude.numel() == outputs:
        axes, shown = tuple(range(1, summed.dim())), (outputs, 1, *ones)
    else:
        axes, shown = (0, *range(2, summed.dim())), (1, inputs, *ones)
    scaled: Tensor = magnitude.reshape(shown) * summed / torch.linalg.vector_norm(summed, dim=axes, keepdim=True)
    return scaled


def is_norm(magnitude: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether DoRA's norms belong to a weight: (O,) and (O, 1, …) are each output's, (1, I, …) each input's."""
    outputs, inputs = shape[:2]
    if magnitude.dim() and magnitude.shape[0] == outputs and magnitude.numel() == outputs:
        return True
    return magnitude.dim() > 1 and tuple(magnitude.shape[:2]) == (1, inputs) and magnitude.numel() == inputs
