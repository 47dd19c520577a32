"""Readers of JSON, safetensors and `.npy` files that answer damage with one line: which file, and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Of what the store holds: nothing there is the only copy.
MADE_AGAIN = "Delete its folder: it is then made again"


def read_object(path: Path, keys: Iterable[str] = (), remedy: str = MADE_AGAIN) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        keys: Names that it must hold.
        remedy: What to do about a damaged file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds no object with these names.
    """
    value = _json(path, remedy)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it should hold a JSON object, not a {type(value).__name__}. {remedy}.")
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"{path} is damaged: it has no {missing[0]!r}. {remedy}.")
    return value


def read_list(path: Path, remedy: str = MADE_AGAIN) -> list[Any]:
    """The list in a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds no list.
    """
    value = _json(path, remedy)
    if not isinstance(value, list):
        raise ValueError(f"{path} is damaged: it should hold a JSON list, not a {type(value).__name__}. {remedy}.")
    return value


def _json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not valid JSON ({error}). {remedy}.") from error


def read_tensors(path: Path, names: Iterable[str] = (), remedy: str = MADE_AGAIN) -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Args:
        path: The file.
        names: Names that it must hold.
        remedy: What to do about a damaged file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or lacks a tensor.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged: its tensors cannot be read ({error}). {remedy}.") from error
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{path} is damaged: it has no tensor {missing[0]!r}. {remedy}.")
    return tensors


def read_array(path: Path, mmap_mode: Literal["r", "c"] | None = None, remedy: str = MADE_AGAIN) -> NDArray[Any]:
    """The array in a `.npy` file; nothing in it is unpickled.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged.
    """
    try:
        array: NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (ValueError, EOFError, OSError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: its array cannot be read ({error}). {remedy}.") from error
    return array
