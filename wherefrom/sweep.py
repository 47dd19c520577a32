"""Many retrainings: what was measured before is not done again, the rest is done here or shared out to workers.

What a panel measures on a model is a row in a small table that outlives the weights: a sweep goes on from the table
alone, and weights may be deleted at any time.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from wherefrom.attributors.base import Say, silent
from wherefrom.progress import duration, room
from wherefrom.retraining import PIPELINE, Measurement, Panel, Retrain, Retrains
from wherefrom.runner import best_device
from wherefrom.storage import replacing, storage_errors

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


class Work:
    """What a worker does with one model: train it if its weights are not there, and measure the panel on it.

    Args:
        retrains: Trains, or finds what was trained.
        panel: The queries.
        device: Where models are measured; by default a GPU where the worker has one.
    """

    def __init__(self, retrains: Retrains, panel: Panel, device: torch.device | None = None) -> None:
        self.retrains, self.panel, self.device = retrains, panel, device

    def __call__(self, retrain: Retrain) -> Finished:
        """Trains and measures.

        Raises:
            ValueError: Training failed or a loss is not finite.
            StorageError: The store could not be written.
        """
        started = time.monotonic()
        measured = self.panel.measure(self.retrains.model(retrain).to(self.device or best_device()))
        return Finished(measured, time.monotonic() - started)


Item = TypeVar("Item")
Result = TypeVar("Result")
# Does the work for each item, in any order; one whose work failed comes back with what went wrong.
Engine = Callable[[Callable[[Item], Result], Sequence[Item]], Iterator[tuple[Item, Result | Exception]]]


def in_process(work: Callable[[Item], Result], wanted: Sequence[Item]) -> Iterator[tuple[Item, Result | Exception]]:
    """One item after the other, in this process."""
    for item in wanted:
        try:
            yield item, work(item)
        except (ValueError, RuntimeError) as error:
            yield item, error


class Measurements:
    """The table of what panels measured: one row a model and query, kept as a small parquet file.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, panel: str) -> dict[str, Finished]:
        """Model -> what this panel measured on it.

        Args:
            panel: The panel's name.

        Raises:
            ValueError: The file is no such table.
        """
        if not self.path.exists():
            return {}
        try:
            rows = pq.read_table(self.path, filters=[("panel", "=", panel)]).to_pylist()
            measured: dict[str, dict[str, Measurement]] = {}
            seconds: dict[str, float] = {}
            for row in rows:
                losses = np.array(row["losses"], dtype=np.float16)
                found = Measurement(row["loss"], losses, row["mse"], row["similarity"])
                measured.setdefault(row["retrain"], {})[row["query"]] = found
                seconds[row["retrain"]] = row["seconds"]
        except (pa.ArrowInvalid, KeyError) as error:
            raise ValueError(
                f"{self.path} is not a table of measurements ({error}). Name another file, or delete it to start anew."
            ) from error
        return {name: Finished(found, seconds[name]) for name, found in measured.items()}

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


def write_strip(path: Path, drawn: Mapping[str, UInt8[NDArray[np.uint8], "h w 3"]]) -> None:
    """Writes what a model draws: the queries' pictures side by side, in the order of their ids.

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
        ValueError: The file is no picture of so many queries.
    """
    try:
        with Image.open(path) as opened:
            strip = np.asarray(opened.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a picture that can be read: {error}") from error
    if strip.shape[1] % len(queries):
        raise ValueError(f"{path} is {strip.shape[1]} pixels wide, which is no multiple of its {len(queries)} queries.")
    return dict(zip(sorted(queries), np.split(strip, len(queries), axis=1), strict=True))


class Sweep:
    """Measures one panel on many models.

    Args:
        retrains: Trains, or finds what was trained.
        panel: The queries.
        table: Where measurements are kept.
        engine: Where the work is done.
        say: Is told the plan and the progress.
        device: See `Work`.
        pictures: Folder for what each model draws, one PNG a model: the queries' pictures side by side, by their ids.
    """

    def __init__(
        self,
        retrains: Retrains,
        panel: Panel,
        table: Measurements,
        engine: Engine[Retrain, Finished] = in_process,
        say: Say = silent,
        device: torch.device | None = None,
        pictures: Path | None = None,
    ) -> None:
        self.retrains, self.panel, self.table, self.engine, self.say = retrains, panel, table, engine, say
        self.pictures = pictures
        self.work = Work(retrains, panel, device)

    def measure(self, wanted: Sequence[Retrain]) -> dict[Retrain, ByQuery]:
        """What the panel says of each model; those that are not in the table are trained and measured now.

        A model that cannot be trained does not stop the others.

        Raises:
            ValueError: Some models could not be trained; the others are in the table.
            StorageError: A file could not be written; what was finished before is kept.
        """
        distinct = list(dict.fromkeys(wanted))
        names = {retrain: self.retrains.name(retrain) for retrain in distinct}
        known = self.table.read(self.panel.name)
        found = {retrain: known[name].measured for retrain, name in names.items() if name in known}
        waiting = [retrain for retrain in distinct if retrain not in found]
        self.say(self._plan(len(distinct), len(waiting), known))
        started, failed = time.monotonic(), []
        for done, (retrain, result) in enumerate(self.engine(self.work, waiting), start=1):
            model = f"seed {retrain.seed}, without {len(retrain.exclude)} pictures"
            if isinstance(result, Exception):
                failed.append((retrain, result))
                self.say(f"FAILED: {model}: {result}")
                continue
            drawn = {query: each.picture for query, each in result.measured.items() if each.picture is not None}
            write_strip(self._strip(names[retrain]), drawn)
            self.table.add(names[retrain], retrain, self.panel.name, result)
            found[retrain] = result.measured
            left = (time.monotonic() - started) / done * (len(waiting) - done)
            self.say(f"model {done} of {len(waiting)} ({model}): {duration(result.seconds)}; {duration(left)} to go")
        if failed:
            retrain, error = failed[0]
            raise ValueError(
                f"{len(failed)} of {len(waiting)} models could not be trained; the others are in {self.table.path}, "
                f"and the same command goes on from there. The first that failed, with seed {retrain.seed} and "
                f"{len(retrain.exclude)} pictures left out ({names[retrain]}): {error}"
            ) from error
        if self.pictures is not None:
            self._bring(names, self.pictures)
        return found

    def _strip(self, name: str) -> Path:
        """What a model draws for this panel, in the store: a run that does not measure it finds it there."""
        return self.retrains.store.root / "drawn" / self.panel.name / f"{name}.png"

    def _bring(self, names: Mapping[Retrain, str], folder: Path) -> None:
        """Puts what each model draws into a run's folder, as far as it was kept or the weights are still there."""
        lost = [each for each, name in names.items() if not self._strip(name).exists() and self.retrains.has(each)]
        if lost:
            self.say(f"drawing again by models that were measured before: {len(lost)}")
        for retrain in lost:
            drawn = self.panel.draw(self.retrains.model(retrain).to(self.work.device or best_device()))
            ids = [query.id for query in self.panel.queries]
            write_strip(self._strip(names[retrain]), dict(zip(ids, drawn, strict=True)))
        for name in names.values():
            if self._strip(name).exists():
                with replacing(folder / f"{name}.png") as temporary:
                    shutil.copyfile(self._strip(name), temporary)

    def _plan(self, count: int, waiting: int, known: Mapping[str, Finished]) -> str:
        plan = f"{count} models, {count - waiting} of them measured before; {waiting} to train"
        if not waiting:
            return plan
        seconds = [finished.seconds for finished in known.values()]
        each = f"about {duration(float(np.median(seconds)))} each" if seconds else "time is known after the first"
        size = self._size()
        disk = "" if size is None else f", {waiting * size / 2**20:,.0f} MiB of weights (which may be deleted any time)"
        return f"{plan}: {each}{disk}; {room(self.retrains.store.root)}"

    def _size(self) -> int | None:
        """Bytes of one model's folder, where there is one."""
        for folder in (self.retrains.store.root / "retrain").glob(f"*/{PIPELINE}"):
            return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return None
