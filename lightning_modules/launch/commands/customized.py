"""Find the exemplars that models were customized on, hidden among other images.

python evaluate.py customized -c configs/experiment/emoji_customized_benchmark.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_modules.launch.arguments import add_methods, add_run
from lightning_modules.launch.outputs import Outputs
from lightning_modules.launch.runs import prepare
from lightning_modules.launch.settings import MethodSettings, ModelSettings
from wherefrom.commands.customization_benchmark import Words, as_table, benchmark
from wherefrom.commands.customization_tasks import Task, read_all
from wherefrom.runtime.run_settings import plain


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings, MethodSettings):
    """Settings of `evaluate.py customized`.

    Attributes:
        tasks: AbU's task list, or AbC's files.
        root: Folder that the tasks' paths are relative to.
        styles: Test cases whose models learned styles.
        words: Prompts with or without the new word.
        k: Of Recall@k.
        limit: Only the first so many models of each test case.
    """

    tasks: list[str]
    root: str
    styles: list[str]
    words: list[Words]
    k: int
    limit: int | None

    def read_tasks(self) -> list[Task]:
        """The tasks."""
        return read_all([Path(file) for file in self.tasks], Path(self.root), self.limit)

    def deciding(self) -> dict[str, Any]:
        """Also where the tasks are."""
        return {**super().deciding(), "root": plain(self.root)}


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_run(parser)
    parser.add_argument("--tasks", type=list[str], required=True, help="AbU's task list, or AbC's files")
    parser.add_argument("--root", type=str, required=True, help="what the tasks' paths are relative to")
    parser.add_argument("--styles", type=list[str], default=[], help="test cases whose models learned styles")
    add_methods(parser)
    parser.add_argument("--words", type=list[Words], default=["with"], help="V* in the prompts: with, without")
    parser.add_argument("--k", type=int, default=10, help="of Recall@k")
    parser.add_argument("--limit", type=int | None, help="only the first so many models of each test case")


def run(settings: Settings) -> Outputs:
    """Attributes the images of customized models, and prints the table.

    Raises:
        ValueError: Queries are named, which this command takes from the tasks.
    """
    if settings.queries.prompts or settings.queries.images:
        raise ValueError(
            "evaluate.py customized takes its queries from the tasks: leave queries.prompts and images out."
        )
    if settings.lora:
        raise ValueError("evaluate.py customized takes its models from the tasks: leave lora out.")
    methods, tasks = settings.methods, settings.read_tasks()
    run = prepare(settings, settings.model, methods.values(), with_queries=False)
    for method in methods.values():
        method.progress = run.console.progress
    lines = benchmark(
        settings.output,
        tasks=tasks,
        styles=settings.styles,
        methods=methods,
        base=settings.model,
        base_model=run.model,
        background=replace(run.data, held_out=None, held_out_latents=None),
        store=run.store,
        runner=run.runner,
        words=settings.words,
        k=settings.k,
        options=settings.report,
        log=run.console.log,
    )
    if run.runner.is_main:
        print(as_table(lines, settings.k))
    return Outputs(run.store, is_main=run.runner.is_main)
