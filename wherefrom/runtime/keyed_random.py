"""Counter-based random numbers: every sample is a function of its key, not of generator state.

A key is a 64-bit integer hashed from what the sample belongs to (seed, image id, flip, caption, timestep, sample
index). Two runs that differ in batch size, order, worker, rank, device count or resume therefore see the same noise,
so differences of losses are differences of models ("common random numbers").

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)
run from the key as its state, and Box-Muller in float64 for the normals.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def hash_text(text: str) -> int:
    """Hashes a string to a signed 64-bit integer (BLAKE2b), the same on every machine and run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def hash_texts(texts: Sequence[str]) -> Int64[Tensor, " n"]:
    """Hashes each string with `hash_text`; returns a tensor of keys."""
    return torch.tensor([hash_text(text) for text in texts], dtype=torch.int64)


def _logical_shift_right(x: Tensor, bits: int) -> Tensor:
    # torch's >> copies the sign bit; the mask makes it the unsigned shift that the algorithm requires.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift_right(x, 30)) * _MIX_1
    x = (x ^ _logical_shift_right(x, 27)) * _MIX_2
    return x ^ _logical_shift_right(x, 31)


def combine(*parts: int | Tensor) -> Int64[Tensor, "..."]:
    """Combines integers and int64 tensors (broadcast together) into keys; the order of the parts matters."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        value = torch.as_tensor(part, dtype=torch.int64)
        if value.device != key.device:
            key = key.to(value.device) if value.dim() else key
            value = value.to(key.device)
        key = _mix((key ^ value) * _MIX_1 + _GOLDEN)
    return key


def bits(keys: Int64[Tensor, "..."], count: int) -> Int64[Tensor, "... count"]:
    """Generates `count` pseudo-random 64-bit words for each key."""
    steps = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _GOLDEN
    return _mix(keys.unsqueeze(-1) + steps)


def uniform(keys: Int64[Tensor, "..."], count: int = 1) -> Float[Tensor, "... count"]:
    """Generates `count` uniform float64 numbers in [0, 1) for each key."""
    return _logical_shift_right(bits(keys, count), 11).to(torch.float64) * 2.0**-53


def normal(
    keys: Int64[Tensor, " n"], shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "n ..."]:
    """Generates standard normal noise of the given shape for each key.

    Computed in float64 and rounded once, so that float32 and float64 runs see the same noise.
    """
    size = int(torch.Size(shape).numel())
    half = (size + 1) // 2
    u = uniform(keys, 2 * half)
    radius = torch.sqrt(-2.0 * torch.log1p(-u[..., :half]))  # log(1 - u), u < 1: never log(0)
    angle = (2.0 * torch.pi) * u[..., half:]
    noise = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)[..., :size]
    return noise.to(dtype).reshape(*keys.shape, *shape)
