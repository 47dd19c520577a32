"""Rank ensemble: the mean of several methods' ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.attributors.base import Attributor
from wherefrom.attributors.compute_estimate import ComputeEstimate, ComputeStage
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.rankings.ranking_file import normalised_ranks
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner


class RankEnsemble(Attributor):
    """Rank ensemble: τ(ẑ, z) = -(1/M) Σ_m r_m(z), with r_m(z) in [0, 1] the normalised rank of z by method m.

    0 is first by all methods, -1 last by all. Ranks are averaged because the methods' scores have different scales.

    Args:
        methods: The M methods; all score the same images.

    Raises:
        ValueError: There are fewer than two.
    """

    def __init__(self, methods: list[Attributor]) -> None:
        if len(methods) < 2:
            raise ValueError(f"An ensemble needs at least two methods; given {len(methods)}.")
        self.methods = list(methods)
        self.requires = frozenset(need for method in methods for need in method.requires)
        self.takes_regions = all(method.takes_regions for method in methods)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {"method": "rank ensemble", "of": [method.identity() for method in self.methods]}

    def removed(self, data: TrainingData, store: Store) -> frozenset[str]:
        """Images that were removed from the index of any of the methods."""
        return frozenset().union(*(method.removed(data, store) for method in self.methods))

    def check(self, queries: Sequence[Query]) -> None:
        """Raises for queries that one of the methods cannot attribute."""
        for method in self.methods:
            method.check(queries)

    def estimate(self, data: TrainingData, queries: int) -> ComputeEstimate:
        """Sum over the methods, memory too, because all of them are held at the same time."""
        each = [method.estimate(data, queries) for method in self.methods]
        return ComputeEstimate(
            once=sum(estimate.once for estimate in each),
            per_query=sum(estimate.per_query for estimate in each),
            disk=sum(estimate.disk for estimate in each),
            memory=sum(estimate.memory for estimate in each),
        )

    def stages(
        self, data: TrainingData, *, queries: int, name: str, candidates: int | None = None
    ) -> list[ComputeStage]:
        """Stages of all methods; their names carry the method's number."""
        return [
            stage
            for number, method in enumerate(self.methods, start=1)
            for stage in method.stages(data, queries=queries, name=f"{name}, {number}", candidates=candidates)
        ]

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Fits all methods."""
        for method in self.methods:
            method.progress = self.progress
            method.fit(data, model, store, runner, log)

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """Averages the methods' ranks, one query at a time."""
        for query, *result in zip(
            queries, *(method.score(queries, candidates) for method in self.methods), strict=True
        ):
            ids = result[0].ids
            assert all(scores.ids == ids for scores in result)
            ranks = np.mean([normalised_ranks(ids, scores.scores) for scores in result], axis=0)
            with_null = all(len(scores.null) for scores in result)
            null = np.mean([_null_ranks(scores) for scores in result], axis=0) if with_null else np.zeros(0)
            of_one = None
            if any(scores.per_copy is not None for scores in result):
                of_one = -np.mean([normalised_ranks(ids, scores.comparable) for scores in result], axis=0)
            yield Scores(query, ids, -ranks, -null, per_copy=of_one)


def _null_ranks(scores: Scores) -> Float[NDArray[np.float64], " m"]:
    """Normalised ranks of the null scores among the training images' scores."""
    ordered = np.sort(scores.comparable)
    return (len(ordered) - np.searchsorted(ordered, scores.null, side="right")) / len(ordered)
