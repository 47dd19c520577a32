"""Rank the training images by their influence on each query image.

python evaluate.py attribute -c configs/experiment/demo.yaml
python evaluate.py attribute -c configs/experiment/demo.yaml --queries.prompts '["fox, openmoji style"]' --output runs/f
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

from lightning_modules.launch.arguments import add_run
from lightning_modules.launch.outputs import Outputs
from lightning_modules.launch.runs import prepare
from lightning_modules.launch.settings import ModelSettings
from wherefrom.attributors import Attributor
from wherefrom.commands.attribute import attribute
from wherefrom.commands.estimate import announce
from wherefrom.runtime.console import peak_memory


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings):
    """Settings of `evaluate.py attribute`.

    Attributes:
        attributor: The method.
        cut: Images of each query in the ranking; None is all.
    """

    attributor: Attributor
    cut: int | None

    def __post_init__(self) -> None:
        if self.cut is not None and self.cut < 1:
            raise ValueError(f"--cut must be at least 1; given {self.cut}.")

    def identities(self) -> dict[str, dict[str, Any]]:
        """The one method's."""
        return {"attributor": self.attributor.identity()}


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_run(parser)
    parser.add_subclass_arguments(Attributor, "attributor", required=True)
    parser.add_argument(
        "--cut", type=int | None, help="rank only the first so many; all scores go to parquet parts beside the ranking"
    )


def run(settings: Settings) -> Outputs:
    """Attributes the queries."""
    attributor, output = settings.attributor, settings.output
    run = prepare(settings, settings.model, [attributor], lora=settings.lora)
    if run.runner.is_main:
        announce(
            run.console,
            attributor=attributor,
            data=run.data,
            model=run.model,
            queries=len(run.queries),
            output=output,
        )
    attributor.progress = run.console.progress
    results = attribute(
        output,
        attributor=attributor,
        data=run.data,
        model=run.model,
        queries=run.queries,
        store=run.store,
        runner=run.runner,
        options=settings.report,
        log=run.console.log,
        cut=settings.cut,
    )
    run.console.log(f"report: {output / 'report.html'}   ranking: {output / 'ranking.parquet'}")
    run.console.log(f"peak resident memory: {peak_memory() / 2**30:.2f} GiB")
    return Outputs(run.store, results, run.data.images, run.runner.is_main)
