"""Run folders: refused where they hold another run, before any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_modules.launch.committed import refuse_committed
from lightning_modules.launch.settings import RunSettings, TrialSettings
from wherefrom.runtime.run_settings import check_settings, record_settings


@contextmanager
def claimed(command: str, settings: RunSettings, words: Sequence[str]) -> Iterator[None]:
    """Checks that a run may write to its folder before it works, and leaves a record of its settings there.

    A folder that is not there yet receives the record once the run has made it: a run that is refused for another
    reason leaves none behind.

    Args:
        command: The command.
        settings: Its settings.
        words: The command line.

    Raises:
        ArtifactMismatchError: The folder holds a run with other settings, or is one of the checkout's committed ones
            and no flag names it.
        StorageError: The folder cannot be written.
    """
    refuse_committed(settings.output, "output", ["--output"], words)
    if isinstance(settings, TrialSettings):
        refuse_committed(settings.results, "results", ["--results"], words)
    deciding, methods = {"command": command, **settings.deciding()}, settings.identities()
    check_settings(settings.output, deciding, methods)
    if settings.output.exists():
        record_settings(settings.output, deciding, methods)
    try:
        yield
    finally:
        if settings.output.exists():
            record_settings(settings.output, deciding, methods)
