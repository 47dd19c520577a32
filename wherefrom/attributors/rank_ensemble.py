"""Several methods in one: their ranks averaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.attributors.base import Attributor, Work
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.rankings.ranking_file import normalised_ranks
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner


class RankEnsemble(Attributor):
    """Minus the mean of the methods' normalised ranks: from -1 (last by all) to 0 (first by all).

    Scores of different methods cannot be added; their ranks can.

    Args:
        methods: The methods; each is asked about the same images.

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

    def taken_down(self, data: TrainingData, store: Store) -> frozenset[str]:
        """What was taken down from one of them."""
        return frozenset().union(*(method.taken_down(data, store) for method in self.methods))

    def check(self, queries: Sequence[Query]) -> None:
        """Refuses what one of the methods refuses."""
        for method in self.methods:
            method.check(queries)

    def work(self, data: TrainingData, queries: int) -> Work:
        """All methods'; they are in memory together."""
        each = [method.work(data, queries) for method in self.methods]
        return Work(*(sum(getattr(work, part) for work in each) for part in ("once", "per_query", "disk", "memory")))

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Makes what all methods need."""
        for method in self.methods:
            method.progress = self.progress
            method.fit(data, model, store, runner, log)

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """One query at a time."""
        for query, *result in zip(
            queries, *(method.score(queries, candidates) for method in self.methods), strict=True
        ):
            ids = result[0].ids
            assert all(scores.ids == ids for scores in result)
            ranks = np.mean([normalised_ranks(ids, scores.scores) for scores in result], axis=0)
            with_null = all(len(scores.null) for scores in result)
            null = np.mean([_places(scores) for scores in result], axis=0) if with_null else np.zeros(0)
            yield Scores(query, ids, -ranks, -null)


def _places(scores: Scores) -> Float[NDArray[np.float64], " m"]:
    """The normalised ranks that the null's scores would have among the images' own."""
    ordered = np.sort(scores.scores)
    return (len(ordered) - np.searchsorted(ordered, scores.null, side="right")) / len(ordered)
