"""Frozen parts given by path: a local folder, a hub id, or a folder that a Python package carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE_PREFIX = "package:"


def resolve_path(path: str) -> str:
    """Turns `package:NAME/FOLDER` into that folder of the installed package; anything else is returned as it is.

    Raises:
        ValueError: The package is not installed or has no such folder.
    """
    if not path.startswith(PACKAGE_PREFIX):
        return path
    name, _, folder = path.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"{path}: the Python package {name!r} is not installed. For the emoji world: pip install "
            "'wherefrom[emoji]'."
        )
    resolved = Path(spec.origin).parent / folder
    if not resolved.exists():
        raise ValueError(f"{path}: the package {name!r} has no {folder!r}.")
    return str(resolved)
