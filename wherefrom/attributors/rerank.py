"""Reranking: an expensive method scores only the candidates that a cheap one retrieves (Fast Data Attribution)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.attributors.base import Attributor
from wherefrom.attributors.compute_estimate import ComputeEstimate, ComputeStage
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.keyed_random import hash_text


class Rerank(Attributor):
    """Reranking of retrieved candidates (Fast Data Attribution, section 4: AbU+ among the nearest neighbours).

    A cheap method retrieves k candidates, an expensive one scores them. All other images rank after the candidates in
    the cheap method's order, with scores below the lowest candidate's that carry no meaning but that order. An
    influential image that is not retrieved is missed, whatever the expensive method.

    Args:
        method: Scores the candidates.
        nearest: Retrieves the candidates, such as `ImageSimilarity`.
        k: How many candidates are scored.
        tails: `first` takes the top k; `both` takes k/2 from the top and k/2 from the bottom of the ranking, because
            first-order scores, such as those of `InfluenceBank`, can put the most influential images at either end.
        subsample: Number of the k candidates that are scored, chosen pseudo-randomly (by hash) for each query; None
            scores all.

    Raises:
        ValueError: `k` or the subsample is not positive, the subsample larger than `k`, or the tails are unknown.
    """

    def __init__(
        self,
        method: Attributor,
        nearest: Attributor,
        k: int,
        tails: Literal["first", "both"] = "first",
        subsample: int | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1; given {k}.")
        if subsample is not None and not 1 <= subsample <= k:
            raise ValueError(f"A subsample must lie between 1 and k, which is {k}; given {subsample}.")
        if tails not in ("first", "both"):
            raise ValueError(f"Unknown tails {tails!r}; choose 'first' or 'both'.")
        self.method, self.nearest, self.k, self.subsample = method, nearest, k, subsample
        self.tails: Literal["first", "both"] = tails
        self.requires = method.requires | nearest.requires
        self.takes_regions = method.takes_regions and nearest.takes_regions

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        method = self.method.identity()
        return {
            "method": f"{method['method']} among the nearest {self.k}",
            "of": method,
            "nearest": self.nearest.identity(),
            "k": self.k,
            **({} if self.tails == "first" else {"tails": self.tails}),
            **({} if self.subsample is None else {"subsample": self.subsample}),
        }

    def removed(self, data: TrainingData, store: Store) -> frozenset[str]:
        """Images that were removed from either method's index."""
        return self.method.removed(data, store) | self.nearest.removed(data, store)

    def check(self, queries: Sequence[Query]) -> None:
        """Raises for queries that either method cannot attribute."""
        for each in (self.method, self.nearest):
            each.check(queries)

    def estimate(self, data: TrainingData, queries: int) -> ComputeEstimate:
        """Cost of the expensive method as if it scored all images: an upper bound; `stages` counts k candidates."""
        return self.method.estimate(data, queries)

    def stages(
        self, data: TrainingData, *, queries: int, name: str, candidates: int | None = None
    ) -> list[ComputeStage]:
        """Stages of retrieval, then of scoring k candidates."""
        return [
            *self.nearest.stages(data, queries=queries, name=f"{name}, choosing"),
            *self.method.stages(data, queries=queries, name=name, candidates=self.k),
        ]

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Fits both methods.

        Raises:
            ValueError: There are fewer than `k` training images.
        """
        if self.k > len(data.images):
            raise ValueError(f"k is {self.k}, but there are {len(data.images)} training images.")
        for each in (self.nearest, self.method):
            each.progress = self.progress
            each.fit(data, model, store, runner, log)
        self.fit_s = {**self.nearest.fit_s, **self.method.fit_s}

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """One query at a time: retrieval, then the scores of the candidates."""
        for query, near in zip(queries, self.nearest.score(queries, candidates), strict=True):
            order = [name for name, _ in near.top(len(near.ids))]
            last = self.k // 2 if self.tails == "both" else 0
            chosen = order if self.k >= len(order) else order[: self.k - last] + order[len(order) - last :]
            if self.subsample is not None:
                keys = {name: hash_text(f"subsample/{query.name}/{name}") for name in chosen}
                chosen = sorted(chosen, key=lambda name: keys[name])[: self.subsample]
            (result,) = self.method.score([query], chosen)
            scores = _completed(result.ids, result.scores, near.ids, order)
            of_one = None if result.per_copy is None else _completed(result.ids, result.per_copy, near.ids, order)
            yield replace(result, ids=near.ids, scores=scores, parts={}, per_copy=of_one)


def _completed(
    scored: Sequence[str], scores: Float[NDArray[np.float64], " k"], ids: Sequence[str], order: Sequence[str]
) -> Float[NDArray[np.float64], " n"]:
    """Scores of all images: those that were not rescored follow below the lowest rescored one, in this order."""
    by_id = dict(zip(scored, scores.tolist(), strict=True))
    lowest, spread = float(scores.min()), float(np.ptp(scores)) or 1.0
    rest = [name for name in order if name not in by_id]
    by_id |= {name: lowest - spread * (place + 1) / len(ids) for place, name in enumerate(rest)}
    return np.array([by_id[name] for name in ids])
