"""Committed folders of the checkout, which no run changes unless the command line names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wherefrom.runtime.artifacts import ArtifactMismatchError

CHECKOUT = Path(__file__).resolve().parents[2]
COMMITTED = ("weights", "results")


def refuse_committed(path: str | Path | None, what: str, flags: Sequence[str], words: Sequence[str]) -> None:
    """Refuses to write below the checkout's weights/ or results/ unless a flag on the command line asks for it.

    Args:
        path: Where a run would write; None is nowhere.
        what: The setting that names it.
        flags: Flags that ask for it.
        words: The command line.

    Raises:
        ArtifactMismatchError: A file asks for it, or a default, and no flag does.
    """
    if path is None:
        return
    place = Path(path).resolve()
    below = next((name for name in COMMITTED if place.is_relative_to(CHECKOUT / name)), None)
    if below is None or any(word.partition("=")[0] in flags for word in words):
        return
    raise ArtifactMismatchError(
        f"{what} is {path}: this would overwrite what is committed in {below}/. Choose a folder below runs/, or ask "
        f"for it on the command line: {flags[0]} {path}."
    )


def places_of_training(config: Mapping[str, Any]) -> dict[str, str]:
    """Setting -> folder of everything that a training writes.

    Args:
        config: The parsed command line of a subcommand of train.py, as dictionaries.
    """
    trainer = config.get("trainer") or {}
    result = {"trainer.default_root_dir": trainer.get("default_root_dir")}
    for kind, name in (("logger", "save_dir"), ("callbacks", "dirpath"), ("callbacks", "folder")):
        given = trainer.get(kind)
        for each in given if isinstance(given, list) else [given]:
            if isinstance(each, Mapping):
                result[f"{name} of trainer.{kind}"] = (each.get("init_args") or {}).get(name)
    model = config.get("model") or {}
    result["model.init_args.save_to"] = (model.get("init_args") or {}).get("save_to")
    return {name: str(place) for name, place in result.items() if place}
