"""Curate a teacher set: rankings by a slow method that a fast ranker learns from.

python evaluate.py curate -c configs/experiment/emoji_1k_teacher.yaml
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

from lightning_modules.launch.arguments import add_run
from lightning_modules.launch.outputs import Outputs
from lightning_modules.launch.runs import prepare, shapes
from lightning_modules.launch.settings import ModelSettings
from wherefrom.attributors import Attributor
from wherefrom.commands.curate import Captions, curate
from wherefrom.features.base import ImageEncoder, TextEncoder
from wherefrom.runtime.executors import Workers
from wherefrom.runtime.run_settings import plain


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings):
    """Settings of `evaluate.py curate`.

    Attributes:
        teacher: The slow method.
        nearest: The method that chooses candidates; None takes all images.
        captions: Captions that become queries.
        features: Name -> encoder of the features that are kept.
        k: Candidates of each query.
        subsample: Score only so many of these.
        block_size: Queries that a worker is given at a time.
        workers: Where queries are scored.
    """

    teacher: Attributor
    nearest: Attributor | None
    captions: Captions
    features: Mapping[str, ImageEncoder | TextEncoder]
    k: int | None
    subsample: int | None
    block_size: int
    workers: Workers

    def deciding(self) -> dict[str, Any]:
        """Also which queries are scored, against which candidates."""
        own = plain({name: self.given[name] for name in ("captions", "k", "subsample", "block_size")})
        return {**super().deciding(), **own, "teacher": self.teacher.identity(), "nearest": self._nearest()}

    def _nearest(self) -> dict[str, Any] | None:
        return None if self.nearest is None or self.k is None else self.nearest.identity()


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_run(parser)
    parser.add_subclass_arguments(Attributor, "teacher", required=True)
    parser.add_subclass_arguments(Attributor, "nearest", required=False)
    parser.add_class_arguments(Captions, "captions")
    parser.add_argument("--features", type=dict[str, ImageEncoder | TextEncoder], required=True)
    parser.add_argument("--k", type=int | None, help="candidates of each query: the nearest so many")
    parser.add_argument("--subsample", type=int | None, help="score only so many of these")
    parser.add_argument("--block_size", type=int, default=16, help="queries that a worker is given at a time")
    parser.add_class_arguments(Workers, "workers")


def run(settings: Settings) -> Outputs:
    """Draws the queries and scores them.

    Raises:
        ValueError: Queries are named, which this command draws from captions.
    """
    if settings.queries.prompts or settings.queries.images:
        raise ValueError("evaluate.py curate draws its queries from captions: leave queries.prompts and images out.")
    run = prepare(settings, settings.model, [settings.teacher], with_queries=False, lora=settings.lora)
    alone = settings.workers.engine == "local"
    curate(
        settings.output,
        teacher=settings.teacher,
        data=run.data,
        model=run.model,
        captions=settings.captions,
        source=settings.queries,
        shape=shapes(run.data)[0],
        features=settings.features,
        store=run.store,
        nearest=settings.nearest,
        k=settings.k,
        subsample=settings.subsample,
        block_size=settings.block_size,
        engine=settings.workers.get(),
        runner=run.runner if alone else None,
        log=run.console.log,
        progress=run.console.progress if alone else None,
    )
    return Outputs(run.store, is_main=run.runner.is_main)
