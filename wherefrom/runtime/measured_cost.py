"""Measured time, memory and storage of a method."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

_SAMPLE_EVERY_S = 0.1


@dataclass(frozen=True)
class Cost:
    """Measured cost of a method for some queries, on the machine that ran it.

    Attributes:
        seconds: Mean seconds per query, without `fit`. Not the median: a method that scores many queries in one pass
            spends all its seconds before the first of them.
        memory: Peak resident memory of the process while it ran, in bytes.
        stored: Bytes on disk: the run folder, and all artifacts that the method built or reused from the store.
    """

    seconds: float
    memory: int
    stored: int


@contextmanager
def track_peak_memory() -> Iterator[list[int]]:
    """Yields a list whose only element is the peak resident memory while the block runs, in bytes."""
    process, done = psutil.Process(), threading.Event()
    largest = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(_SAMPLE_EVERY_S):
            largest[0] = max(largest[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield largest
    finally:
        done.set()
        thread.join()
        largest[0] = max(largest[0], process.memory_info().rss)
