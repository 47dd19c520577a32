"""What command lines share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def mistakes_in_one_line(called_from_python: bool) -> Iterator[None]:
    """Ends the program with one line, not a traceback, where the user made a mistake.

    Args:
        called_from_python: Leave errors to the caller instead.

    Raises:
        SystemExit: With status 1, after the line.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if called_from_python:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
