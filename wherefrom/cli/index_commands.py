"""`wherefrom index`: see `wherefrom.index.__main__`."""

from __future__ import annotations

from collections.abc import Sequence


def run(command: str, words: Sequence[str]) -> None:
    """Runs one of the index's commands."""
    from wherefrom.index.__main__ import run as run_index

    run_index(words, "wherefrom index")
