"""Random projections of gradients whose matrix is never stored: its rows are keyed, and made when they are needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from wherefrom import keyed

_ROW = 501
_NUMBERS_AT_A_TIME = 8_000_000  # of the matrix: 32 MB in float32


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

    def rows(self, name: str, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "n d"]:
        """The matrix's rows for some of a parameter's numbers, before the division by √dimension."""
        positions = torch.arange(start, stop, device=device)
        keys = keyed.combine(_ROW, self.seed, keyed.hash_text(name), positions)
        if self.kind == "gaussian":
            return keyed.normal(keys, (self.dimension,), dtype)
        words = keyed.bits(keys, -(-self.dimension // 64))
        signs = (words.unsqueeze(-1) >> torch.arange(64, device=device)) & 1
        return signs.flatten(1)[:, : self.dimension].to(dtype).mul_(2).sub_(1)

    def project(self, gradients: Mapping[str, Float[Tensor, "b ..."]]) -> Float[Tensor, "b d"]:
        """Pᵀg of each gradient of a batch, given by parameter."""
        first = next(iter(gradients.values()))
        total = torch.zeros(len(first), self.dimension, dtype=first.dtype, device=first.device)
        step = max(1, _NUMBERS_AT_A_TIME // self.dimension)
        for name, gradient in gradients.items():
            flat = gradient.flatten(1)
            for start in range(0, flat.shape[1], step):
                stop = min(start + step, flat.shape[1])
                total += flat[:, start:stop] @ self.rows(name, start, stop, flat.device, flat.dtype)
        return total / math.sqrt(self.dimension)
