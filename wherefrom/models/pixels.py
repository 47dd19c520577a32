"""Pixels as networks take them."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def to_float(pixels: UInt8[Tensor, "... h w 3"]) -> Float[Tensor, "... 3 h w"]:
    """uint8 RGB to float32 channels-first in [-1, 1]."""
    return pixels.movedim(-1, -3).to(torch.float32) / 127.5 - 1.0
