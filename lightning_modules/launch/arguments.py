"""Parts of the parsers of evaluate.py's commands that several share."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import Path_fr

import datamodules  # noqa: F401  so that YAML may use short class names
from datamodules.images import ImageDataModule
from lightning_modules.launch.settings import Devices
from wherefrom.commands.tracking import Tracking
from wherefrom.features.base import ImageEncoder
from wherefrom.queries.sources import QuerySource
from wherefrom.reports.query_section import ReportOptions
from wherefrom.runtime.executors import Workers


class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help that leaves the lines of examples as they are."""


def command_parser(description: str | None) -> ArgumentParser:
    """A parser of one command."""
    return ArgumentParser(description=description, parser_mode="omegaconf", formatter_class=Formatter)


def add_run(parser: ArgumentParser, *, model: bool = True, required: bool = True) -> None:
    """Adds what all commands over queries take.

    Args:
        parser: The command's.
        model: Add `--model`.
        required: Model and data are required.
    """
    parser.add_argument("-c", "--config", action="config", help="an experiment file")
    if model:
        model_type = str if required else str | None
        parser.add_argument("--model", type=model_type, required=required, help="diffusers pipeline: folder or hub id")
    if model and required:
        parser.add_argument(
            "--lora",
            type=list[str],
            default=[],
            help="adapters that were trained on the model, as style.safetensors:0.8; files, folders or hub ids",
        )
    parser.add_subclass_arguments(ImageDataModule, "data", required=required)
    parser.add_class_arguments(QuerySource, "queries")
    parser.add_class_arguments(ReportOptions, "report")
    parser.add_class_arguments(Devices, "trainer")
    parser.add_class_arguments(Tracking, "wandb")
    parser.add_argument("--output", type=str, required=True, help="the run folder")
    parser.add_argument("--store", type=str, default="cache", help="folder for what is computed once")


def add_methods(parser: ArgumentParser, required: bool = True) -> None:
    """Adds what names a command's methods."""
    named: dict[str, Any] = {"required": True} if required else {"default": []}
    parser.add_argument(
        "--methods", type=list[Path_fr], help="method files, such as those of configs/attributor", **named
    )
    parser.add_argument(
        "--settings",
        type=dict[str, Any],
        default={},
        help="replace the files' values in all methods that have them, or in one: "
        "{noise_samples: 5, trak/noise_samples: 9}",
    )
    parser.add_argument(
        "--variants",
        type=dict[str, dict[str, Any]],
        default={},
        help="further methods, each one of the files with settings of its own: "
        "{more_samples: {trak/noise_samples: 90}}",
    )


def add_trial(parser: ArgumentParser) -> None:
    """Adds what all evaluations that retrain take."""
    add_run(parser, model=False)
    parser.add_argument(
        "--model", type=str | None, help="folder of the recipe's model of all images; without it, it is trained"
    )
    parser.add_argument(
        "--also", type=list[str], default=[], help="prompts of further images that every model is measured on"
    )
    parser.add_class_arguments(Workers, "workers")
    add_methods(parser)
    parser.add_argument("--recipe", type=Path_fr, required=True, help="an experiment file of train.py fit")
    parser.add_subclass_arguments(ImageEncoder, "similarity", required=False)
    parser.add_argument(
        "--measurements",
        type=str | list[str] | None,
        help="tables of earlier measurements, which are found again and not changed",
    )
    parser.add_argument(
        "--results",
        type=str | None,
        help="folder whose retrains.parquet receives new measurements, such as results/emoji (default: the run folder)",
    )
