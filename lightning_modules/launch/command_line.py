"""The command line of evaluate.py: its parsers, and settings from words."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from jsonargparse import ArgumentParser

from lightning_modules.launch.arguments import Formatter, command_parser
from wherefrom.commands.curvature_settings import accept_old_curvature, words_in_new_form
from wherefrom.runtime.renamed_settings import accepting_old_names

PARSED = ("attribute", "compare", "retrieval", "counterfactual", "lds", "report", "curate", "calibrate", "customized")


def module_of(command: str) -> ModuleType:
    """The file of a command."""
    return import_module(f"lightning_modules.launch.commands.{command}")


def parser(commands: Sequence[str] = PARSED) -> ArgumentParser:
    """The command line with some of its commands."""
    root = ArgumentParser(prog="evaluate.py", parser_mode="omegaconf", formatter_class=Formatter)
    subcommands = root.add_subcommands()
    for command in commands:
        module = module_of(command)
        made = command_parser(module.__doc__)
        module.add_arguments(made)
        subcommands.add_subcommand(command, made)
    return root


def parse(words: Sequence[str]) -> tuple[ModuleType, Any]:
    """The file of the command that the words name, and its typed settings.

    Old names of settings are accepted here, in all files that the words name, with one line of warning.

    Raises:
        SystemExit: The words cannot be parsed, or ask for help.
        ValueError: A value is out of its range, or a file is wrong.
    """
    command = words[0]
    root, module = parser([command]), module_of(command)
    torch.set_float32_matmul_precision("high")
    accept_old_curvature()
    with accepting_old_names(words) as current:
        config = root.parse_args(words_in_new_form(current))
        made = root.instantiate(config)
        return module, module.Settings.of(made[command], config[command].as_dict())
