"""What a person sees while something long runs: lines of what is being done, a bar.

And an estimate before it starts.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from tqdm import tqdm

from wherefrom import keyed
from wherefrom.data.latents import LatentSet
from wherefrom.diffusion import DiffusionModel

if TYPE_CHECKING:  # attributors show their progress by this module
    from wherefrom.attributors.base import Attributor, TrainingData


class Console:
    """Prints on one process; silent on the others.

    Args:
        active: Whether this process prints.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self._bar: Any = None
        self._label = ""

    def say(self, message: str) -> None:
        """A line; it also names the next bar."""
        self._label = message
        if self.active:
            tqdm.write(message, file=sys.stderr)

    def progress(self, done: int, total: int) -> None:
        """Moves the bar to `done` of `total`; the last call removes it."""
        if not self.active:
            return
        if self._bar is None:
            self._bar = tqdm(total=total, desc=self._label[:40], leave=False, file=sys.stderr)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar = None


def forward_rate(model: DiffusionModel, data: LatentSet, batch_size: int = 128, enough: float = 0.3) -> float:
    """Forward passes a second, measured on the training latents.

    Batches grow to `batch_size`, or until one takes long enough to be measured, so that large models on slow machines
    are not asked for more than a few passes.

    Args:
        model: The model.
        data: The training set.
        batch_size: The largest batch.
        enough: Seconds that a batch must take to be measured.
    """
    size, seconds = 1, 0.0
    _time_batch(model, data, size)  # the first pass also sets things up
    while True:
        seconds = _time_batch(model, data, size)
        if seconds >= enough or size >= batch_size:
            break
        size = min(batch_size, 4 * size)
    repeats = 1 if seconds >= enough else 3
    return repeats * size / sum(_time_batch(model, data, size) for _ in range(repeats))


def _time_batch(model: DiffusionModel, data: LatentSet, size: int) -> float:
    rows = torch.arange(size) % len(data)
    latents = data.latents[rows, 0].to(model.device, model.dtype)
    states = data.states[rows, 0].to(model.device, model.dtype)
    noise = keyed.normal(keyed.combine(rows), latents.shape[1:], model.dtype).to(model.device)
    timesteps = (torch.arange(size) * model.process.steps // size).to(model.device)
    started = time.perf_counter()
    with torch.no_grad():
        float(model.losses(latents, states, timesteps, noise).sum())  # waits for the device
    return time.perf_counter() - started


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def room(folder: Path) -> str:
    """Free memory and free disk below a folder, in words."""
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    return f"{psutil.virtual_memory().available / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB of disk are free"


def announce(
    console: Console, attributor: Attributor, data: TrainingData, model: DiffusionModel, queries: int, output: Path
) -> None:
    """Prints time, memory and disk before anything long starts."""
    work = attributor.work(data, queries)
    if work.per_query == 0 or data.latents is None:
        return
    rate = forward_rate(model, data.latents)
    console.say(
        f"estimate at {rate:,.0f} forward passes a second: {duration(work.once / rate)} once for this model, then "
        f"{duration(work.per_query / rate)} for each of {queries} queries; {work.disk / 2**20:,.0f} MiB on disk, about "
        f"{(work.memory + peak_memory()) / 2**30:.1f} GiB of memory; {room(output)}"
    )
