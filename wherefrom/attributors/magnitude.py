"""Ranking by the absolute value of another method's scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from wherefrom.attributors.base import Attributor
from wherefrom.attributors.compute_estimate import ComputeEstimate, ComputeStage
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner


def by_size(scores: Scores) -> Scores:
    """Scores, null scores and scores by part, replaced by their absolute values."""
    parts = {name: np.abs(part) for name, part in scores.parts.items()}
    per_copy = None if scores.per_copy is None else np.abs(scores.per_copy)
    return replace(scores, scores=np.abs(scores.scores), null=np.abs(scores.null), parts=parts, per_copy=per_copy)


class Magnitude(Attributor):
    """Magnitude ranking: |τ(ẑ, z)|, with τ the score of another method, so that effects of either sign rank first.

    Scores that are loss changes are signed. Training images that share a caption (or a learned token) compete:
    unlearning one of them can lower the loss of the others, which a signed ranking then puts last.

    Args:
        method: The method whose scores are taken.
    """

    def __init__(self, method: Attributor) -> None:
        self.method = method
        self.requires = method.requires
        self.takes_regions = method.takes_regions

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        method = self.method.identity()
        return {"method": f"{method['method']}, by size", "of": method}

    def removed(self, data: TrainingData, store: Store) -> frozenset[str]:
        """Images that were removed from the method's index."""
        return self.method.removed(data, store)

    def check(self, queries: Sequence[Query]) -> None:
        """Raises for queries that the wrapped method cannot attribute."""
        self.method.check(queries)

    def estimate(self, data: TrainingData, queries: int) -> ComputeEstimate:
        """Cost of the wrapped method."""
        return self.method.estimate(data, queries)

    def stages(
        self, data: TrainingData, *, queries: int, name: str, candidates: int | None = None
    ) -> list[ComputeStage]:
        """Stages of the wrapped method."""
        return self.method.stages(data, queries=queries, name=name, candidates=candidates)

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Fits the wrapped method."""
        self.method.progress = self.progress
        self.method.fit(data, model, store, runner, log)
        self.fit_s = self.method.fit_s

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """Absolute values of the wrapped method's scores, one query at a time."""
        yield from map(by_size, self.method.score(queries, candidates))
