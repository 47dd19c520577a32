"""What is done about images that cannot be read."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

from wherefrom.runtime.stable_names import settings_identity

OnError = Literal["stop", "skip"]


def checked(on_error: str, skip_unreadable: bool | None = None) -> OnError:
    """The choice, also by its name before: `skip_unreadable: true` is now `on_error: skip`.

    Raises:
        ValueError: It is neither `stop` nor `skip`.
    """
    if skip_unreadable is not None:
        warnings.warn("skip_unreadable is now on_error, 'skip' or 'stop'.", DeprecationWarning, stacklevel=4)
        on_error = "skip" if skip_unreadable else on_error
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error is one of {', '.join(get_args(OnError))}; given {on_error!r}.")
    return "skip" if on_error == "skip" else "stop"


def reading_identity(options: Any) -> dict[str, Any]:
    """The identity of options of reading images, which call the choice by its first name.

    Args:
        options: An instance of a data class with a field `on_error`.
    """
    said = settings_identity(options)
    return {**said, "skip_unreadable": said.pop("on_error") == "skip"}
