"""The size of another method's scores, whatever their sign."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from wherefrom.attributors.base import Attributor, Work
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner


def by_size(scores: Scores) -> Scores:
    """Scores without their signs, parts and null alike."""
    parts = {name: np.abs(part) for name, part in scores.parts.items()}
    return replace(scores, scores=np.abs(scores.scores), null=np.abs(scores.null), parts=parts)


class Magnitude(Attributor):
    """Ranks by |score|: images that a method says much about, for or against.

    Scores that are changes of a loss have a sign. Images that share a caption or a new word are learned at each
    other's expense: what makes a model forget one of them can make it better at the others, which then come last.

    Args:
        method: Whose scores.
    """

    def __init__(self, method: Attributor) -> None:
        self.method = method
        self.requires = method.requires
        self.takes_regions = method.takes_regions

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        method = self.method.identity()
        return {"method": f"{method['method']}, by size", "of": method}

    def taken_down(self, data: TrainingData, store: Store) -> frozenset[str]:
        """The method's."""
        return self.method.taken_down(data, store)

    def check(self, queries: Sequence[Query]) -> None:
        """Refuses what the method refuses."""
        self.method.check(queries)

    def work(self, data: TrainingData, queries: int) -> Work:
        """The method's."""
        return self.method.work(data, queries)

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Makes what the method needs."""
        self.method.progress = self.progress
        self.method.fit(data, model, store, runner, log)
        self.fit_s = self.method.fit_s

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """The method's scores without their signs."""
        yield from map(by_size, self.method.score(queries, candidates))
