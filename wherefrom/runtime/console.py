"""What a person sees while something long runs: lines of what is being done, a bar.

And an estimate before it starts.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm


class Console:
    """Prints on one process; silent on the others.

    Args:
        active: Whether this process prints.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self._bar: Any = None
        self._label = ""

    def log(self, message: str) -> None:
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


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # which only Unix has

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def room(folder: Path) -> str:
    """Free memory and free disk below a folder, in words."""
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    return f"{psutil.virtual_memory().available / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB of disk are free"


Log = Callable[[str], None]


def no_log(message: str) -> None:
    """Says nothing."""


Progress = Callable[[int, int], None]
