"""What a method took for its queries, measured while it ran."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

_SAMPLE_EVERY_S = 0.1


@dataclass(frozen=True)
class Cost:
    """What a method took for these queries, on the machine that ran it.

    Attributes:
        seconds: Mean seconds a query, without what is made once. Not the median: a method that serves many queries by
            one pass has all its seconds before the first of them.
        memory: Largest resident memory of the process while it ran, in bytes.
        stored: Bytes that answer these queries together: the run folder, and what the method made or found in the
            store, whichever method made it.
    """

    seconds: float
    memory: int
    stored: int


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Yields a list whose one number is the largest resident memory seen while the block runs, in bytes."""
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
