"""Compare several methods on the same queries: cost, agreement, first images side by side.

python evaluate.py compare -c configs/experiment/emoji_comparison.yaml
"""

from __future__ import annotations

from dataclasses import dataclass

from jsonargparse import ArgumentParser

from lightning_modules.launch.arguments import add_methods, add_run
from lightning_modules.launch.outputs import Outputs
from lightning_modules.launch.runs import prepare
from lightning_modules.launch.settings import MethodSettings, ModelSettings
from wherefrom.commands.compare import compare
from wherefrom.commands.estimate import announce


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings, MethodSettings):
    """Settings of `evaluate.py compare`."""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_run(parser)
    add_methods(parser)


def run(settings: Settings) -> Outputs:
    """Runs every method on the queries."""
    methods, output = settings.methods, settings.output
    run = prepare(settings, settings.model, methods.values(), lora=settings.lora)
    for name, method in methods.items():
        if run.runner.is_main:
            run.console.log(name)
            announce(
                run.console, attributor=method, data=run.data, model=run.model, queries=len(run.queries), output=output
            )
        method.progress = run.console.progress
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
    run.console.log(f"report: {output / 'report.html'}   table: {output / 'methods.parquet'}")
    return Outputs(run.store, is_main=run.runner.is_main)
