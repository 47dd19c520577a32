"""Estimates of a run's time, memory and disk before it starts, at a rate measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime import keyed_random
from wherefrom.runtime.console import Console, duration, peak_memory, room

if TYPE_CHECKING:
    from wherefrom.attributors.base import Attributor
    from wherefrom.queries.types import TrainingData


def forward_rate(model: DiffusionModel, data: EncodedImages, batch_size: int = 128, enough: float = 0.3) -> float:
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


def _time_batch(model: DiffusionModel, data: EncodedImages, size: int) -> float:
    rows = torch.arange(size) % len(data)
    latents = data.latents_at(rows, 0).to(model.device, model.dtype)
    conditioning = data.conditioning_at(rows, 0).to(model.device, model.dtype)
    noise = keyed_random.normal(keyed_random.combine(rows), latents.shape[1:], model.dtype).to(model.device)
    timesteps = (torch.arange(size) * model.noise_schedule.steps // size).to(model.device)
    started = time.perf_counter()
    with torch.no_grad():
        float(model.losses(latents, conditioning, timesteps, noise).sum())  # waits for the device
    return time.perf_counter() - started


def announce(
    console: Console, *, attributor: Attributor, data: TrainingData, model: DiffusionModel, queries: int, output: Path
) -> None:
    """Logs the estimated time, memory and disk of an attribution."""
    estimate = attributor.estimate(data, queries)
    if estimate.per_query == 0 or data.latents is None:
        return
    rate = forward_rate(model, data.latents)
    console.log(
        f"estimate at {rate:,.0f} forward passes a second: {duration(estimate.once / rate)} once for this model, then "
        f"{duration(estimate.per_query / rate)} for each of {queries} queries; {estimate.disk / 2**20:,.0f} MiB on "
        f"disk, about {(estimate.memory + peak_memory()) / 2**30:.1f} GiB of memory; {room(output)}"
    )


@dataclass(frozen=True)
class Stage:
    """A part of a run, as a row of a budget.

    Attributes:
        name: What is computed.
        seconds: How long it takes on one device.
        disk: Bytes that it leaves on disk.
        memory: Bytes that it holds in memory beside the model.
        each: The unit that `seconds` are per (a query, a training) where the stage is repeated; "" is once.
        times: Number of repetitions.
        at_once: How many repetitions run at a time, by as many workers.
    """

    name: str
    seconds: float
    disk: int = 0
    memory: int = 0
    each: str = ""
    times: int = 1
    at_once: int = 1

    def total(self, devices: int) -> float:
        """Seconds of all repetitions, on devices that share each evenly."""
        return self.seconds / devices * self.times / self.at_once


def timed(work: Callable[[], int]) -> float:
    """Seconds of one unit of what `work` does; `work` returns how many units it did."""
    started = time.perf_counter()
    count = work()
    return (time.perf_counter() - started) / max(count, 1)
