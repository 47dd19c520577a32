"""Many retrainings: what was measured before is not done again, the rest is done here or shared out to workers.

What a panel measures on a model is a row in a small table that outlives the weights: a sweep goes on from the table
alone, and weights may be deleted at any time.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from wherefrom.counterfactual.measurements import ByQuery, Finished, Measurements, write_strip
from wherefrom.counterfactual.retraining import PIPELINE, Panel, Retrain, Retrains
from wherefrom.runtime.artifacts import replacing
from wherefrom.runtime.console import Log, duration, no_log, room
from wherefrom.runtime.distributed import best_device
from wherefrom.runtime.executors import Engine, in_process


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


class Sweep:
    """Measures one panel on many models.

    Args:
        retrains: Trains, or finds what was trained.
        panel: The queries.
        table: Where measurements are kept.
        engine: Where the work is done.
        log: Receives lines about the plan and the progress.
        device: See `Work`.
        images: Folder for what each model draws, one PNG a model: the queries' images side by side, by their ids.
    """

    def __init__(
        self,
        retrains: Retrains,
        *,
        panel: Panel,
        table: Measurements,
        engine: Engine[Retrain, Finished] = in_process,
        log: Log = no_log,
        device: torch.device | None = None,
        images: Path | None = None,
    ) -> None:
        self.retrains, self.panel, self.table, self.engine, self.log = retrains, panel, table, engine, log
        self.images = images
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
        collected = {retrain: known[name].measured for retrain, name in names.items() if name in known}
        waiting = [retrain for retrain in distinct if retrain not in collected]
        self.log(self._plan(len(distinct), len(waiting), known))
        started, failed = time.monotonic(), []
        for done, (retrain, result) in enumerate(self.engine(self.work, waiting), start=1):
            model = f"seed {retrain.seed}, without {len(retrain.exclude)} images"
            if isinstance(result, Exception):
                failed.append((retrain, result))
                self.log(f"FAILED: {model}: {result}")
                continue
            drawn = {query: each.image for query, each in result.measured.items() if each.image is not None}
            write_strip(self._strip(names[retrain]), drawn)
            self.table.add(names[retrain], retrain, self.panel.name, result)
            collected[retrain] = result.measured
            left = (time.monotonic() - started) / done * (len(waiting) - done)
            self.log(f"model {done} of {len(waiting)} ({model}): {duration(result.seconds)}; {duration(left)} to go")
        if failed:
            retrain, error = failed[0]
            raise ValueError(
                f"{len(failed)} of {len(waiting)} models could not be trained; the others are in {self.table.path}, "
                f"and the same command goes on from there. The first that failed, with seed {retrain.seed} and "
                f"{len(retrain.exclude)} images left out ({names[retrain]}): {error}"
            ) from error
        if self.images is not None:
            self._bring(names, self.images)
        return collected

    def _strip(self, name: str) -> Path:
        """What a model draws for this panel, in the store: a run that does not measure it finds it there."""
        return self.retrains.store.root / "drawn" / self.panel.name / f"{name}.png"

    def _bring(self, names: Mapping[Retrain, str], folder: Path) -> None:
        """Puts what each model draws into a run's folder, as far as it was kept or the weights are still there."""
        lost = [each for each, name in names.items() if not self._strip(name).exists() and self.retrains.has(each)]
        if lost:
            self.log(f"drawing again by models that were measured before: {len(lost)}")
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
