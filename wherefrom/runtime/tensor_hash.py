"""Hashes of named tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def hash_tensors(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Hashes named tensors (names, types, shapes, bytes); the hash is the same on every device."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(dict(tensors).items()):
        array = tensor.detach().to("cpu").contiguous()
        digest.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
        # Flat, as a side of length 1 may keep any stride, which viewing as bytes refuses.
        flat = array.reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if array.dim() else str(array.item()).encode())
    return digest.hexdigest()
