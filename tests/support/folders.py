"""Small folders of captioned images to test with."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Rows = list[dict[str, Any]]
FORMATS = ("jsonl", "csv", "parquet")


def write_metadata(folder: Path, rows: Rows, kind: str = "jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"metadata.{kind}"
    names = list(dict.fromkeys(name for row in rows for name in row))
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


def paint(path: Path, seed: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def make(folder: Path, count: int = 3, kind: str = "jsonl", **cells: Any) -> Rows:
    """Images 0.png, 1.png, … with captions; further cells are the same for all."""
    rows = [{"file_name": f"{index}.png", "text": f"number {index}", **cells} for index in range(count)]
    for index, row in enumerate(rows):
        paint(folder / row["file_name"], index)
    write_metadata(folder, rows, kind)
    return rows
