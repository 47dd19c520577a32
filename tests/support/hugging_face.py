"""Data sets as Hugging Face's `datasets` writes them, with images in columns."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Picture


def painted(seed: int, size: int = 8) -> np.ndarray:
    """Random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def encoded(seed: int, size: int = 8) -> bytes:
    """The same as a PNG file."""
    stream = io.BytesIO()
    Picture.fromarray(painted(seed, size)).save(stream, "PNG")
    return stream.getvalue()


def dataset(count: int = 5, first: int = 0, named: bool = False, **columns: list[Any]) -> Dataset:
    """Images with captions, an author and a label.

    Args:
        count: How many.
        first: Seed of the first; the others follow.
        named: Whether each image carries the name of a file.
        columns: Further or other columns.
    """
    numbers = range(first, first + count)
    cells: dict[str, Any] = {
        "image": [{"bytes": encoded(n), "path": f"picture-{n:03d}.png" if named else None} for n in numbers],
        "text": [f"number {n}" for n in numbers],
        "author": [f"author {n % 2}" for n in numbers],
        "style": [n % 2 for n in numbers],
        "boxes": [[0.0, 1.0]] * count,
        **columns,
    }
    kinds = {
        "image": Image(),
        "mask": Image(),
        "style": ClassLabel(names=["oil", "ink"]),
        "boxes": List(Value("float32")),
    }
    of_texts = {name: Value("string") for name in ("text", "author", "id", "caption")}
    texts = {name: List(Value("string")) for name, value in columns.items() if value and isinstance(value[0], list)}
    features = {name: (texts | kinds | of_texts if name not in texts else texts)[name] for name in cells}
    return Dataset.from_dict(cells, features=Features(features))


def hub_layout(folder: Path, splits: dict[str, Dataset]) -> Path:
    """The splits as the hub keeps them."""
    (folder / "data").mkdir(parents=True)
    for name, split in splits.items():
        split.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder
