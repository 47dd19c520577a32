"""Attribute images to the training images that influenced them, compare methods, and evaluate them by retraining."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what takes long to import waits until a command is parsed
    from jsonargparse import ArgumentParser

FOLDER = Path(__file__).parent / "lightning_modules" / "launch" / "commands"
COMMANDS = (
    "attribute",
    "compare",
    "retrieval",
    "counterfactual",
    "lds",
    "report",
    "curate",
    "calibrate",
    "customized",
    "budget",
)
TRAINING = ("counterfactual", "lds")  # they are handed train.main


def documented(command: str) -> list[str]:
    """Lines of a command's help, read from its file without importing it."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{command}.py").read_text(encoding="utf-8")))
    assert text is not None
    return text.splitlines()


def usage() -> str:
    """A line for each command, and runnable examples."""
    helps = {command: documented(command) for command in COMMANDS}
    lines = ["usage: python evaluate.py COMMAND ...", "", str(__doc__), "", "commands:"]
    lines += [f"  {command:<16}{text[0]}" for command, text in helps.items()]
    lines += ["", "examples:"]
    lines += [f"  {line}" for text in helps.values() for line in text if line.startswith("python ")]
    return "\n".join([*lines, "", "python evaluate.py COMMAND --help lists the settings of a command."])


def parser() -> ArgumentParser:
    """The command line with all its commands."""
    from lightning_modules.launch.command_line import parser as parser_of

    return parser_of()


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake is one line, not a traceback.

    Args:
        args: Words of the command line; None takes the program's.

    Raises:
        SystemExit: The words cannot be parsed.
    """
    words = sys.argv[1:] if args is None else list(args)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    command = words[0]
    if command not in COMMANDS:
        print(f"error: there is no command {command!r}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)
    if command == "budget" and words[1:2] in (["-h"], ["--help"]):
        print("\n".join(documented(command)))
        return
    from lightning_modules.launch.words import DATA_WORDS
    from wherefrom.runtime.cli_errors import mistakes_in_one_line, option_names

    with mistakes_in_one_line(called_from_python=args is not None), option_names(DATA_WORDS):
        run(words)


def run(words: Sequence[str]) -> None:
    """Parses and runs a command, and logs it to W&B where that is asked for."""
    from lightning_modules.launch import command_line

    if words[0] == "budget":
        import train
        from lightning_modules.launch.commands import budget

        budget.run(words[1:], train.main)
        return
    from lightning.pytorch.utilities import rank_zero_only

    from lightning_modules.launch.folders import claimed
    from lightning_modules.launch.settings import RunSettings
    from wherefrom.commands.tracking import track, tracked

    module, settings = command_line.parse(words)
    arguments: tuple[Any, ...] = (settings,)
    if words[0] in TRAINING:
        import train

        arguments = (settings, train.main)
    if not isinstance(settings, RunSettings):
        module.run(*arguments)
        return
    about: dict[str, Any] = {"job": words[0], "folder": settings.output, "config": settings.given}
    is_main = getattr(rank_zero_only, "rank", None) in (None, 0) and os.environ.get("NODE_RANK", "0") == "0"
    with claimed(words[0], settings, words), tracked(settings.wandb, **about, is_main=is_main) as opened:
        outputs = module.run(*arguments)
    if outputs is not None and outputs.is_main:
        track(
            settings.wandb,
            **about,
            store=outputs.store,
            results=outputs.results,
            images=outputs.images,
            run=opened,
        )


if __name__ == "__main__":
    main()
