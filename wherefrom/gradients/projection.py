"""Random projections of gradients; the matrix is never stored, its keyed rows are generated when they are needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from wherefrom.runtime import keyed_random
from wherefrom.runtime.salts import Salt
from wherefrom.runtime.stable_names import settings_identity

# Another number is another matrix, and `construction` says so to the store.
_NUMBERS_AT_A_TIME = 2_000_000  # of the matrix: 8 MB in float32, which a processor's caches nearly hold
_ON_A_GPU = 32  # times as many, since starting a kernel costs more there than memory
_ONE, _SIGN = 0x3F800000, -(2**31)  # 1.0 and -0.0 in the bits of a float32


@dataclass(frozen=True)
class Projection:
    """Random projection g ↦ Pᵀg; P has uncorrelated entries of mean 0 and variance 1 / dimension.

    Inner products are therefore preserved in expectation: E[(Pᵀg)ᵀ(Pᵀh)] = gᵀh.

    Rows are keyed by (seed, parameter name, position in the parameter): the projection of a gradient is the sum of the
    projections of its parts, on any device, whatever other parameters there are.

    Attributes:
        dimension: Dimension of a projected gradient.
        seed: Seed of the matrix.
        kind: Signs (`rademacher`), or normal numbers (`gaussian`), which take longer to make; or one sign a row and
            zeros (`sparse`: the count sketch, Charikar, Chen and Farach-Colton 2002), some thirty times as fast. An
            inner product scatters as much with it as with signs, with heavier tails where few numbers outweigh others.

    Raises:
        ValueError: `dimension` is not positive, or the kind is unknown.
    """

    dimension: int = 2048
    seed: int = 0
    kind: Literal["rademacher", "gaussian", "sparse"] = "rademacher"

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ValueError(f"The projection's dimension must be at least 1; given {self.dimension}.")
        if self.kind not in ("rademacher", "gaussian", "sparse"):
            raise ValueError(f"Unknown projection {self.kind!r}; choose 'rademacher', 'gaussian' or 'sparse'.")

    def identity(self) -> dict[str, Any]:
        """The settings that decide the matrix, and the version of its construction."""
        return {**settings_identity(self), "construction": int(Salt.PROJECTION_ROW)}

    def rows(
        self,
        name: str,
        *,
        start: int,
        stop: int,
        device: torch.device,
        dtype: torch.dtype,
        room: Int32[Tensor, "m 32 w"] | None = None,
    ) -> Float[Tensor, "n d"]:
        """The matrix's rows for some of a parameter's numbers, before the division by √dimension.

        Args:
            name: The parameter.
            start: Its first number.
            stop: The number after its last.
            device: Where the rows are made.
            dtype: Their type of number.
            room: Memory from `room` that the rows may be made in, until the next ones are.
        """
        if self.kind == "sparse":
            columns, signs = self._sparse_rows(name, start, stop, device, dtype)
            rows = torch.zeros(stop - start, self.dimension, dtype=dtype, device=device)
            return rows.scatter_(1, columns[:, None], signs[:, None] * math.sqrt(self.dimension))
        keys = self._keys(name, start, stop, device)
        if self.kind == "gaussian":
            return keyed_random.normal(keys, (self.dimension,), dtype)
        halves = self._halves
        words = keyed_random.bits(keys, -(-halves // 2)).view(torch.int32)[:, None, :halves]
        # Each bit in turn is shifted to where a float32 has its sign. All words' first bits come first, then all their
        # second bits, …: each operation then runs along a whole row of words instead of the few bits of one.
        signs = (self.room(len(keys), device) if room is None else room)[: len(keys)]
        torch.bitwise_left_shift(words, torch.arange(32, dtype=torch.int32, device=device)[:, None], out=signs)
        signs.bitwise_and_(_SIGN).bitwise_or_(_ONE)
        return signs.view(torch.float32).flatten(1)[:, : self.dimension].to(dtype)

    @property
    def _halves(self) -> int:
        """Halves of 64-bit words that a row of signs takes."""
        return -(-self.dimension // 32)

    def room(self, count: int, device: torch.device) -> Int32[Tensor, "count 32 w"]:
        """Memory for so many rows of signs: fresh memory for each block would cost as much time as making the signs."""
        return torch.empty(count, 32, self._halves, dtype=torch.int32, device=device)

    def _keys(self, name: str, start: int, stop: int, device: torch.device) -> Int64[Tensor, " n"]:
        positions = torch.arange(start, stop, device=device)
        return keyed_random.combine(Salt.PROJECTION_ROW, self.seed, keyed_random.hash_text(name), positions)

    def _sparse_rows(
        self, name: str, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Int64[Tensor, " n"], Float[Tensor, " n"]]:
        """Column and sign of each row's only entry; the sign stands for √dimension of it."""
        sign, column = keyed_random.bits(self._keys(name, start, stop, device), 2).unbind(dim=1)
        return torch.remainder(column, self.dimension), (sign & 1).to(dtype).mul_(2).sub_(1)

    def project(self, gradients: Mapping[str, Float[Tensor, "b ..."]]) -> Float[Tensor, "b d"]:
        """Pᵀg of each gradient of a batch, given by parameter; summed in float32, or float64 if they are."""
        first = next(iter(gradients.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        total = torch.zeros(len(first), self.dimension, dtype=dtype, device=first.device)
        sparse = self.kind == "sparse"
        numbers = _NUMBERS_AT_A_TIME * (1 if first.device.type == "cpu" else _ON_A_GPU)
        step = max(1, numbers // (len(first) if sparse else self.dimension))
        room = self.room(step, first.device) if self.kind == "rademacher" else None
        for name, gradient in gradients.items():
            flat = gradient.flatten(1)
            for start in range(0, flat.shape[1], step):
                stop = min(start + step, flat.shape[1])
                part = flat[:, start:stop].to(dtype)
                if sparse:
                    columns, signs = self._sparse_rows(name, start, stop, flat.device, dtype)
                    total.index_add_(1, columns, part * signs)
                else:
                    total.addmm_(
                        part, self.rows(name, start=start, stop=stop, device=flat.device, dtype=dtype, room=room)
                    )
        return total if sparse else total / math.sqrt(self.dimension)
