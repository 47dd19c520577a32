"""Names of splits, as the ecosystem writes them."""

from __future__ import annotations

from collections.abc import Collection

ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_named(name: str, known: Collection[str] = ()) -> str | None:
    """The split that a user means by a name, or None.

    Args:
        name: The name.
        known: The splits that there are.
    """
    return name if name in known else ALIASES.get(name.strip().lower())
