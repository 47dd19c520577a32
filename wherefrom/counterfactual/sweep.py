"""Sweep over many retrainings: those in the table of measurements are skipped, the rest runs here or on workers.

A sweep resumes from the table alone, so weights may be deleted at any time.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from wherefrom.counterfactual.generated_images import write_strip
from wherefrom.counterfactual.measurements import MeasurementsByQuery, MeasurementTable, ModelMeasurements
from wherefrom.counterfactual.query_panel import Panel
from wherefrom.counterfactual.retraining import PIPELINE, RetrainedModels, RetrainingJob
from wherefrom.runtime.artifacts import replacing
from wherefrom.runtime.console import Log, duration, no_log, room
from wherefrom.runtime.distributed import best_device
from wherefrom.runtime.executors import Engine, in_process


class TrainAndMeasure:
    """A worker's task: train one model if its weights are not there, and measure the panel on it.

    Args:
        models: Trains models, or finds those that were trained.
        panel: The queries.
        device: Where models are measured; by default a GPU where the worker has one.
    """

    def __init__(self, models: RetrainedModels, panel: Panel, device: torch.device | None = None) -> None:
        self.models, self.panel, self.device = models, panel, device

    def __call__(self, job: RetrainingJob) -> ModelMeasurements:
        """Trains and measures.

        Raises:
            ValueError: Training failed or a loss is not finite.
            StorageError: The store could not be written.
        """
        started = time.monotonic()
        measured = self.panel.measure(self.models.model(job).to(self.device or best_device()))
        return ModelMeasurements(measured, time.monotonic() - started)


class Sweep:
    """Measures one panel on many models.

    Args:
        models: Trains models, or finds those that were trained.
        panel: The queries.
        table: Where measurements are kept.
        engine: Runs the training and measuring: in this process, or on workers.
        log: Receives lines about the plan and the progress.
        device: Where models are measured; by default a GPU where the worker has one.
        images: Folder for the images that each model draws, one PNG a model: side by side, in the order of their ids.
    """

    def __init__(
        self,
        models: RetrainedModels,
        *,
        panel: Panel,
        table: MeasurementTable,
        engine: Engine[RetrainingJob, ModelMeasurements] = in_process,
        log: Log = no_log,
        device: torch.device | None = None,
        images: Path | None = None,
    ) -> None:
        self.models, self.panel, self.table, self.engine, self.log = models, panel, table, engine, log
        self.images = images
        self.task = TrainAndMeasure(models, panel, device)

    def measure(self, wanted: Sequence[RetrainingJob]) -> dict[RetrainingJob, MeasurementsByQuery]:
        """The panel's measurements on each model; those that are not in the table are trained and measured now.

        A model that cannot be trained does not stop the others.

        Raises:
            ValueError: Some models could not be trained; the others are in the table.
            StorageError: A file could not be written; what was finished before is kept.
        """
        distinct = list(dict.fromkeys(wanted))
        names = {job: self.models.name(job) for job in distinct}
        known = self.table.read(self.panel.name)
        collected = {job: known[name].measured for job, name in names.items() if name in known}
        waiting = [job for job in distinct if job not in collected]
        self.log(self._plan(len(distinct), len(waiting), known))
        started, failed = time.monotonic(), []
        for done, (job, result) in enumerate(self.engine(self.task, waiting), start=1):
            model = f"seed {job.seed}, without {len(job.exclude)} images"
            if isinstance(result, Exception):
                failed.append((job, result))
                self.log(f"FAILED: {model}: {result}")
                continue
            drawn = {query: each.image for query, each in result.measured.items() if each.image is not None}
            write_strip(self._strip(names[job]), drawn)
            self.table.add(names[job], job, self.panel.name, result)
            collected[job] = result.measured
            left = (time.monotonic() - started) / done * (len(waiting) - done)
            self.log(f"model {done} of {len(waiting)} ({model}): {duration(result.seconds)}; {duration(left)} to go")
        if failed:
            job, error = failed[0]
            raise ValueError(
                f"{len(failed)} of {len(waiting)} models could not be trained; the others are in {self.table.path}, "
                f"and the same command resumes from there. The first that failed, with seed {job.seed} and "
                f"{len(job.exclude)} images left out ({names[job]}): {error}"
            ) from error
        if self.images is not None:
            self._copy_images(names, self.images)
        return collected

    def _strip(self, name: str) -> Path:
        """A model's images for this panel, in the store: a run that does not measure the model finds them there."""
        return self.models.store.root / "drawn" / self.panel.name / f"{name}.png"

    def _copy_images(self, names: Mapping[RetrainingJob, str], folder: Path) -> None:
        """Copies the models' images into a run's folder, where they were kept or the weights are still there."""
        lost = [each for each, name in names.items() if not self._strip(name).exists() and self.models.has(each)]
        if lost:
            self.log(f"drawing again by models that were measured before: {len(lost)}")
        for job in lost:
            drawn = self.panel.draw(self.models.model(job).to(self.task.device or best_device()))
            ids = [query.id for query in self.panel.queries]
            write_strip(self._strip(names[job]), dict(zip(ids, drawn, strict=True)))
        for name in names.values():
            if self._strip(name).exists():
                with replacing(folder / f"{name}.png") as temporary:
                    shutil.copyfile(self._strip(name), temporary)

    def _plan(self, count: int, waiting: int, known: Mapping[str, ModelMeasurements]) -> str:
        plan = f"{count} models, {count - waiting} of them measured before; {waiting} to train"
        if not waiting:
            return plan
        seconds = [finished.seconds for finished in known.values()]
        each = f"about {duration(float(np.median(seconds)))} each" if seconds else "time is known after the first"
        size = self._size()
        disk = "" if size is None else f", {waiting * size / 2**20:,.0f} MiB of weights (which may be deleted any time)"
        return f"{plan}: {each}{disk}; {room(self.models.store.root)}"

    def _size(self) -> int | None:
        """Bytes of one model's folder, where there is one."""
        for folder in (self.models.store.root / "retrain").glob(f"*/{PIPELINE}"):
            return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return None
