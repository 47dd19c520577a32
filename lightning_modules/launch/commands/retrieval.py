"""Measure mAP and Recall of fast rankings against a slow method's.

python evaluate.py retrieval --teacher runs/compared/trak --rankings abu=runs/compared/abu --output runs/recall
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_modules.launch.arguments import add_methods, add_run
from lightning_modules.launch.outputs import Outputs
from lightning_modules.launch.runs import prepare
from lightning_modules.launch.settings import MethodSettings
from wherefrom.commands.compare import compare
from wherefrom.commands.evaluate_retrieval import DEPTHS, as_table, named_folders, retrieval
from wherefrom.runtime.run_settings import plain


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """Settings of `evaluate.py retrieval`.

    Attributes:
        model: A diffusers pipeline, where methods are given.
        teacher: Run folder or teacher set with whole rankings.
        ceiling: The teacher's by other noise or another model seed.
        rankings: `name=folder` of each ranking that is measured.
        k: Numbers of images, or below 1 shares of the training set.
    """

    model: str | None
    teacher: str
    ceiling: str | None
    rankings: list[str]
    k: list[float]

    def deciding(self) -> dict[str, Any]:
        """What decides the methods' rankings; which others are read may change."""
        return {**super().deciding(), "model": plain(self.model)} if self.methods else {}


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_run(parser, required=False)
    parser.add_argument("--teacher", type=str, required=True, help="run folder or teacher set, whole rankings")
    parser.add_argument("--ceiling", type=str | None, help="the teacher's, other noise or another model seed")
    parser.add_argument("--rankings", type=str, nargs="+", default=[], help="name=folder of what is measured")
    add_methods(parser, required=False)
    parser.add_argument(
        "--k", type=list[float], default=list(DEPTHS), help="numbers, or below 1 shares of the training set"
    )


def run(settings: Settings) -> Outputs:
    """Ranks by the methods, where there are any, and prints the table."""
    output, methods = settings.output, settings.methods
    folders = named_folders([*settings.rankings, *(f"{name}={output / name}" for name in methods)])
    if methods:
        if settings.model is None or settings.data is None:
            raise ValueError("methods: attributors need --model and --data; rankings that are kept need neither.")
        run = prepare(settings, settings.model, methods.values())
        compare(
            output,
            methods=methods,
            data=run.data,
            model=run.model,
            queries=run.queries,
            store=run.store,
            runner=run.runner,
            options=settings.report,
            log=run.console.log,
        )
        if not run.runner.is_main:
            return Outputs(is_main=False)
    ceiling = None if settings.ceiling is None else Path(settings.ceiling)
    print(as_table(retrieval(output, Path(settings.teacher), folders, ceiling, settings.k)))
    return Outputs()
