"""Executors of a sweep: this process, or Ray workers on one or several machines."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

_RETRIES = 3


@dataclass(frozen=True)
class Workers:
    """Workers of a sweep, which train its models or score its queries.

    With Ray each worker is a process that stays alive from one task to the next. A worker that is killed is restarted,
    and its model is resumed from the last checkpoint if the store is shared.

    Attributes:
        engine: `local` (this process) or `ray` (`pip install 'wherefrom[ray]'`).
        count: Ray: number of workers.
        cpus: Ray: processor cores per worker, which is also its number of threads.
        gpus: Ray: GPUs per worker.
        address: Ray: address of a running cluster, such as `auto`; without it one is started on this machine. All its
            machines need this checkout at the same path, for example by `ray job submit --working-dir .`.
    """

    engine: Literal["local", "ray"] = "local"
    count: int = 1
    cpus: float = 1
    gpus: float = 0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.cpus < 0 or self.gpus < 0:
            raise ValueError(
                f"workers need a positive count, and cpus and gpus that are not negative; given count {self.count}, "
                f"cpus {self.cpus} and gpus {self.gpus}."
            )

    def get(self) -> Engine[Any, Any]:
        """Returns the executor: a function that runs a task for each item."""
        return in_process if self.engine == "local" else self._with_ray

    def _with_ray(
        self, work: Callable[[Item], Result], wanted: Sequence[Item]
    ) -> Iterator[tuple[Item, Result | Exception]]:
        if not wanted:
            return
        try:
            import ray
            from ray.util import ActorPool
        except ImportError as error:
            raise ValueError("workers.engine ray needs Ray: pip install 'wherefrom[ray]'.") from error
        started = not ray.is_initialized()
        if started:
            settings: dict[str, Any] = {"address": self.address, "logging_level": logging.WARNING}
            if self.address is None:
                # By default Ray gives its workers the lowest priority: beside other processes they would hardly run.
                os.environ.setdefault("RAY_worker_niceness", "0")
                settings |= {"num_cpus": max(1, math.ceil(self.count * self.cpus)), "include_dashboard": False}
            ray.init(**settings)
        make = ray.remote(_Worker).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=-1, max_task_retries=_RETRIES
        )
        try:
            shared, folder = ray.put(work), str(Path.cwd())
            workers = [make.remote() for _ in range(min(self.count, len(wanted)))]
            pool: Any = ActorPool(workers)
            # Inside a list the reference is not resolved: a worker fetches the task once, not with each model.
            yield from pool.map_unordered(lambda worker, item: worker.run.remote([shared], folder, item), wanted)
        except ray.exceptions.RayActorError as error:
            raise ValueError(
                f"A worker died {_RETRIES + 1} times on one task, for example out of memory; see Ray's logs. Finished "
                f"results are kept. Ray reports: {error}"
            ) from error
        finally:
            if started:
                ray.shutdown()


class _Worker:
    """Ray actor that runs one task after another."""

    def __init__(self) -> None:
        self.work: Callable[[Any], Any] | None = None

    def run(self, shared: Sequence[Any], folder: str, item: Any) -> tuple[Any, Any]:
        """Runs the task for one item."""
        if self.work is None:
            import ray

            os.chdir(folder)  # paths in configurations are relative to where the sweep was started
            self.work = ray.get(shared[0])
        return next(in_process(self.work, [item]))


Item = TypeVar("Item")


Result = TypeVar("Result")


# Runs a task for each item, in any order; a failed item is returned with its exception.
Engine = Callable[[Callable[[Item], Result], Sequence[Item]], Iterator[tuple[Item, Result | Exception]]]


def in_process(work: Callable[[Item], Result], wanted: Sequence[Item]) -> Iterator[tuple[Item, Result | Exception]]:
    """Runs the task for one item after another, in this process."""
    for item in wanted:
        try:
            yield item, work(item)
        except (ValueError, RuntimeError) as error:
            yield item, error
