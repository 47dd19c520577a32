"""`wherefrom convert`: see `wherefrom.interchange.__main__`."""

from __future__ import annotations

from collections.abc import Sequence


def run(command: str, words: Sequence[str]) -> None:
    """Runs one of the conversions."""
    from wherefrom.interchange.__main__ import run as run_conversion

    run_conversion(words, "wherefrom convert")
