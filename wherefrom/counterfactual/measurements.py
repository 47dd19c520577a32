"""Table of measurements: one row a model and query, kept as a small parquet file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from wherefrom.counterfactual.query_panel import Measurement
from wherefrom.counterfactual.retraining import RetrainingJob
from wherefrom.runtime.artifacts import replacing, storage_errors

MeasurementsByQuery = Mapping[str, Measurement]


@dataclass(frozen=True)
class ModelMeasurements:
    """Measurements of all queries on one model.

    Attributes:
        measured: Query id -> its measurement.
        seconds: Time to train (none where the weights were there) and to measure the model.
    """

    measured: MeasurementsByQuery
    seconds: float


class MeasurementTable:
    """Measurements of retrained models in a parquet file, which outlives their weights.

    Args:
        path: The file; it need not exist yet.
        read_also: Tables of other sweeps, whose rows are found again. They are never written to.
    """

    def __init__(self, path: Path, read_also: Sequence[Path] = ()) -> None:
        self.path, self.read_also = path, [table for table in read_also if table != path]

    def read(self, panel: str) -> dict[str, ModelMeasurements]:
        """Model -> what this panel measured on it; empty without a table.

        Args:
            panel: The panel's name.

        Raises:
            ValueError: A file is no such table.
        """
        result: dict[str, ModelMeasurements] = {}
        for table in (*self.read_also, self.path):
            if table.exists():
                result |= _read(table, panel)
        return result

    def add(self, name: str, job: RetrainingJob, panel: str, finished: ModelMeasurements) -> None:
        """Adds a model's rows; several sweeps may write to one table.

        Args:
            name: The model's name.
            job: What it was trained on.
            panel: The panel's name.
            finished: The measurements.

        Raises:
            StorageError: The file could not be written; what it held stays.
        """
        measured, count = finished.measured, len(finished.measured)
        rows = pa.table(
            {
                "retrain": pa.array([name] * count, pa.string()),
                "panel": pa.array([panel] * count, pa.string()),
                "excluded": pa.array([len(job.exclude)] * count, pa.int64()),
                "seed": pa.array([job.seed] * count, pa.int64()),
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


def _read(path: Path, panel: str) -> dict[str, ModelMeasurements]:
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
    return {name: ModelMeasurements(result, seconds[name]) for name, result in measured.items()}
