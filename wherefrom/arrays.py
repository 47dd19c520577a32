"""Arrays on disk that are written block by block and memory-mapped: neither side holds the whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from wherefrom.storage import replacing


def write_array(path: Path, shape: tuple[int, ...], blocks: Iterable[Any], dtype: DTypeLike = np.float32) -> None:
    """Streams blocks into one `.npy` file. Plain writes, not a memory map: a full disk is then an error, not a crash.

    Raises:
        StorageError: The file could not be written.
    """
    with replacing(path) as temporary, temporary.open("wb") as stream:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(stream, header)
        for block in blocks:
            stream.write(np.ascontiguousarray(block, dtype=dtype).tobytes())


def map_array(path: Path) -> Tensor:
    """The array of a `.npy` file, read from disk where it is used."""
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # copy on write: torch asks for writable memory
