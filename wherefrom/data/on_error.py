"""What is done about images that cannot be read."""

from __future__ import annotations

import warnings
from functools import wraps
from typing import Any, Literal, TypeVar, get_args

from wherefrom.runtime.stable_names import settings_identity

OnError = Literal["stop", "skip"]
Options = TypeVar("Options")


def checked(on_error: str) -> OnError:
    """The choice.

    Raises:
        ValueError: It is neither `stop` nor `skip`.
    """
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error is one of {', '.join(get_args(OnError))}; given {on_error!r}.")
    return "skip" if on_error == "skip" else "stop"


def takes_skip_unreadable(kind: type[Options]) -> type[Options]:
    """Lets a data class of options take `skip_unreadable`, the name of `on_error` before; goes soon."""
    made: Any = kind
    given_now = made.__init__

    @wraps(given_now)
    def init(self: Any, *values: Any, **named: Any) -> None:
        if "skip_unreadable" in named:
            warnings.warn("skip_unreadable=True is now on_error='skip'.", DeprecationWarning, stacklevel=2)
            if named.pop("skip_unreadable"):
                named.setdefault("on_error", "skip")
        given_now(self, *values, **named)

    made.__init__ = init
    return kind


def reading_identity(options: Any) -> dict[str, Any]:
    """The identity of options of reading images, which call the choice by its first name.

    Args:
        options: An instance of a data class with a field `on_error`.
    """
    said = settings_identity(options)
    skip = said.pop("on_error") == "skip"
    return {**said, "skip_unreadable": skip}
