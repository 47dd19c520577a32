"""Table of what panels of queries measured on retrained models, and the images that these models drew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from wherefrom.counterfactual.retraining import Measurement, Retrain
from wherefrom.runtime.artifacts import replacing, storage_errors

ByQuery = Mapping[str, Measurement]


@dataclass(frozen=True)
class Finished:
    """A model's measurements.

    Attributes:
        measured: Query id -> what the model says of it.
        seconds: How long it took to train (0 where the weights were there) and to measure the model.
    """

    measured: ByQuery
    seconds: float


class Measurements:
    """The table of what panels measured: one row a model and query, kept as a small parquet file.

    Args:
        path: The file; it need not exist yet.
        read_also: Tables of other sweeps, whose rows are found again. They are never written to.
    """

    def __init__(self, path: Path, read_also: Sequence[Path] = ()) -> None:
        self.path, self.read_also = path, [table for table in read_also if table != path]

    def read(self, panel: str) -> dict[str, Finished]:
        """Model -> what this panel measured on it.

        Args:
            panel: The panel's name.

        Raises:
            ValueError: A file is no such table.
        """
        result: dict[str, Finished] = {}
        for table in (*self.read_also, self.path):
            if table.exists():
                result |= _read(table, panel)
        return result

    def add(self, name: str, retrain: Retrain, panel: str, finished: Finished) -> None:
        """Adds a model's rows; several sweeps may write to one table.

        Args:
            name: The model's name.
            retrain: The model.
            panel: The panel's name.
            finished: What it measured.

        Raises:
            StorageError: The file could not be written; what it held stays.
        """
        measured, count = finished.measured, len(finished.measured)
        rows = pa.table(
            {
                "retrain": pa.array([name] * count, pa.string()),
                "panel": pa.array([panel] * count, pa.string()),
                "excluded": pa.array([len(retrain.exclude)] * count, pa.int64()),
                "seed": pa.array([retrain.seed] * count, pa.int64()),
                "seconds": pa.array([finished.seconds] * count, pa.float64()),
                "query": pa.array(list(measured), pa.string()),
                "loss": pa.array([each.loss for each in measured.values()], pa.float64()),
                "losses": pa.array([each.losses for each in measured.values()], pa.list_(pa.float16())),
                "mse": pa.array([each.mse for each in measured.values()], pa.float64()),
                "similarity": pa.array([each.similarity for each in measured.values()], pa.float64()),
            }
        )
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock")):
                kept = [pq.read_table(self.path)] if self.path.exists() else []
                with replacing(self.path) as temporary:
                    pq.write_table(pa.concat_tables([*kept, rows]), temporary, compression="zstd")


def _read(path: Path, panel: str) -> dict[str, Finished]:
    """Model -> what this panel measured on it, from one table."""
    try:
        rows = pq.read_table(path, filters=[("panel", "=", panel)]).to_pylist()
        measured: dict[str, dict[str, Measurement]] = {}
        seconds: dict[str, float] = {}
        for row in rows:
            losses = np.array(row["losses"], dtype=np.float16)
            result = Measurement(row["loss"], losses, row["mse"], row["similarity"])
            measured.setdefault(row["retrain"], {})[row["query"]] = result
            seconds[row["retrain"]] = row["seconds"]
    except (pa.ArrowInvalid, KeyError) as error:
        raise ValueError(
            f"{path} is not a table of measurements ({error}). Name another file, or delete it to start anew."
        ) from error
    return {name: Finished(result, seconds[name]) for name, result in measured.items()}


def write_strip(path: Path, drawn: Mapping[str, UInt8[NDArray[np.uint8], "h w 3"]]) -> None:
    """Writes what a model draws: the queries' images side by side, in the order of their ids.

    Raises:
        StorageError: The file could not be written.
    """
    with replacing(path) as temporary:
        Image.fromarray(np.concatenate([drawn[query] for query in sorted(drawn)], axis=1)).save(temporary, "PNG")


def read_strip(path: Path, queries: Sequence[str]) -> dict[str, UInt8[NDArray[np.uint8], "h w 3"]]:
    """Query -> what a model draws for it.

    Args:
        path: A file of `write_strip`.
        queries: All queries of the panel.

    Raises:
        ValueError: The file is no image of so many queries.
    """
    try:
        with Image.open(path) as opened:
            strip = np.asarray(opened.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
    if strip.shape[1] % len(queries):
        raise ValueError(f"{path} is {strip.shape[1]} pixels wide, which is no multiple of its {len(queries)} queries.")
    return dict(zip(sorted(queries), np.split(strip, len(queries), axis=1), strict=True))
