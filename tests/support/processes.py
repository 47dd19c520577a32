"""Work in processes of its own, which start without importing torch again: a server that has is forked."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["evaluate", "tests.support.tiny"])


def started(work: Callable[..., object], *arguments: Any) -> ForkServerProcess:
    """A process that does the work; both work and arguments are pickled, so the work stands in a module."""
    process = FORKS.Process(target=work, args=arguments)
    process.start()
    return process


def exit_status_of(work: Callable[..., object], *arguments: Any) -> int:
    """Does the work in a process of its own and waits for it; minus the signal that ended it, if one did."""
    process = started(work, *arguments)
    process.join()
    assert process.exitcode is not None
    return process.exitcode
