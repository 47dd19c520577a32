"""A dear method among the images that a cheap one chooses (Fast Data Attribution, section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from wherefrom.attributors.base import Attributor, Work
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.keyed_random import hash_text


class Rerank(Attributor):
    """Scores the images that are nearest to a query; all others come after them, the nearest first.

    Images that influence a query without resembling it cannot be found, however good the method is.

    Args:
        method: Scores the nearest images.
        nearest: Says which images are near, such as `ImageSimilarity`.
        k: How many are scored.
        tails: `first` chooses the k that are nearest; `both` half of them among the first and half among the last:
            first-order scores, such as those of `InfluenceBank`, can put the most influential images at either end.
        subsample: Of the k chosen, score only so many, drawn by hash for each query; None scores all.

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

    def taken_down(self, data: TrainingData, store: Store) -> frozenset[str]:
        """What was taken down from either method."""
        return self.method.taken_down(data, store) | self.nearest.taken_down(data, store)

    def check(self, queries: Sequence[Query]) -> None:
        """Refuses what either method refuses."""
        for each in (self.method, self.nearest):
            each.check(queries)

    def work(self, data: TrainingData, queries: int) -> Work:
        """The method's, as if it scored all images: what it makes once it makes of all."""
        return self.method.work(data, queries)

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Makes what both methods need.

        Raises:
            ValueError: There are not `k` training images.
        """
        if self.k > len(data.images):
            raise ValueError(f"k is {self.k}, but there are {len(data.images)} training images.")
        for each in (self.nearest, self.method):
            each.progress = self.progress
            each.fit(data, model, store, runner, log)
        self.fit_s = {**self.nearest.fit_s, **self.method.fit_s}

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """One query at a time: those near, then the method among them."""
        for query, near in zip(queries, self.nearest.score(queries, candidates), strict=True):
            order = [name for name, _ in near.top(len(near.ids))]
            last = self.k // 2 if self.tails == "both" else 0
            chosen = order if self.k >= len(order) else order[: self.k - last] + order[len(order) - last :]
            if self.subsample is not None:
                keys = {name: hash_text(f"subsample/{query.name}/{name}") for name in chosen}
                chosen = sorted(chosen, key=lambda name: keys[name])[: self.subsample]
            (result,) = self.method.score([query], chosen)
            by_id = dict(zip(result.ids, result.scores.tolist(), strict=True))
            lowest, spread = float(result.scores.min()), float(np.ptp(result.scores)) or 1.0
            rest = [name for name in order if name not in by_id]
            by_id |= {name: lowest - spread * (place + 1) / len(near.ids) for place, name in enumerate(rest)}
            scores = np.array([by_id[name] for name in near.ids])
            yield replace(result, ids=near.ids, scores=scores, parts={})
