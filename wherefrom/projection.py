"""Random projections of gradients whose matrix is never stored: its rows are keyed, and made when they are needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from wherefrom import keyed

# Another number is another matrix, and `construction` says so to the store.
_ROW = 502
_NUMBERS_AT_A_TIME = 2_000_000  # of the matrix: 8 MB in float32, which a processor's caches nearly hold
_ON_A_GPU = 32  # times as many, since starting a kernel costs more there than memory
_ONE, _SIGN = 0x3F800000, -(2**31)  # 1.0 and -0.0 in the bits of a float32


@dataclass(frozen=True)
class Projection:
    """P with independent entries of mean 0 and variance 1 / dimension, so that inner products are kept on average.

    Rows are keyed by (seed, parameter name, position in the parameter): the projection of a gradient is the sum of the
    projections of its parts, on any device, whatever other parameters there are.

    Attributes:
        dimension: Numbers that are left.
        seed: Seed of the matrix.
        kind: Signs (`rademacher`), or normal numbers (`gaussian`), which take longer to make.

    Raises:
        ValueError: `dimension` is not positive, or the kind is unknown.
    """

    dimension: int = 2048
    seed: int = 0
    kind: Literal["rademacher", "gaussian"] = "rademacher"

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ValueError(f"The projection's dimension must be at least 1; given {self.dimension}.")
        if self.kind not in ("rademacher", "gaussian"):
            raise ValueError(f"Unknown projection {self.kind!r}; choose 'rademacher' or 'gaussian'.")

    def identity(self) -> dict[str, Any]:
        """What decides the matrix: the settings, and how it is made of them."""
        return {**asdict(self), "construction": _ROW}

    def rows(self, name: str, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "n d"]:
        """The matrix's rows for some of a parameter's numbers, before the division by √dimension."""
        positions = torch.arange(start, stop, device=device)
        keys = keyed.combine(_ROW, self.seed, keyed.hash_text(name), positions)
        if self.kind == "gaussian":
            return keyed.normal(keys, (self.dimension,), dtype)
        halves = -(-self.dimension // 32)
        words = keyed.bits(keys, -(-halves // 2)).view(torch.int32)[:, None, :halves]
        # Each bit in turn is shifted to where a float32 has its sign. All words' first bits come first, then all their
        # second bits, …: each operation then runs along a whole row of words instead of the few bits of one.
        signs = torch.empty(len(keys), 32, halves, dtype=torch.int32, device=device)
        torch.bitwise_left_shift(words, torch.arange(32, dtype=torch.int32, device=device)[:, None], out=signs)
        signs.bitwise_and_(_SIGN).bitwise_or_(_ONE)
        return signs.view(torch.float32).flatten(1)[:, : self.dimension].to(dtype)

    def project(self, gradients: Mapping[str, Float[Tensor, "b ..."]]) -> Float[Tensor, "b d"]:
        """Pᵀg of each gradient of a batch, given by parameter; summed in float32, or float64 if they are."""
        first = next(iter(gradients.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        total = torch.zeros(len(first), self.dimension, dtype=dtype, device=first.device)
        step = max(1, _NUMBERS_AT_A_TIME * (1 if first.device.type == "cpu" else _ON_A_GPU) // self.dimension)
        for name, gradient in gradients.items():
            flat = gradient.flatten(1)
            for start in range(0, flat.shape[1], step):
                stop = min(start + step, flat.shape[1])
                total.addmm_(flat[:, start:stop].to(dtype), self.rows(name, start, stop, flat.device, dtype))
        return total / math.sqrt(self.dimension)
