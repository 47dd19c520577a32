"""Errors of command lines and of the library's short way in: one line each, in the words of the interface in use."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_spoken: ContextVar[Mapping[str, str] | None] = ContextVar("words of the interface in use", default=None)


def in_words_of(message: str, words: Mapping[str, str]) -> str:
    """A message with the names of options replaced, the longest first, so that no name is cut."""
    for name in sorted(words, key=len, reverse=True):
        message = message.replace(name, words[name])
    return message


@contextmanager
def option_names(words: Mapping[str, str]) -> Iterator[None]:
    """Lets errors from inside the block name the options of the interface that the user is using.

    Args:
        words: What the library calls an option -> what this interface calls it.

    Raises:
        ValueError: The block's, with its message in the interface's words and the original one as its cause.
    """
    try:
        yield
    except ValueError as error:
        message = in_words_of(str(error), words)
        if message == str(error) or len(error.args) != 1:
            raise
        raise type(error)(message) from error


@contextmanager
def spoken_words(words: Mapping[str, str]) -> Iterator[None]:
    """Lets lines and warnings from inside the block name the options of the interface that the user is using.

    Not for a generator's body, which would leave the words behind where it is interrupted.

    Args:
        words: See `option_names`.
    """
    token = _spoken.set(words)
    try:
        yield
    finally:
        _spoken.reset(token)


def as_spoken(message: str) -> str:
    """A line in the words of the interface in use; see `spoken_words`."""
    return in_words_of(message, _spoken.get() or {})


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
