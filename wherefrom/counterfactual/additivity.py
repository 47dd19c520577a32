"""Do the effects of images add up? Retraining without either half of what a method names, and without both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.counterfactual.effects import Measured, effects, or_none
from wherefrom.counterfactual.removal import Removal, plan_removals, top_of_ranking
from wherefrom.metrics.standard_error import estimate

_PARTS = ("first", "second", "both", "synergy")


@dataclass(frozen=True)
class Halved:
    """The removals of one method and K, and those of the halves of each query's top K.

    Attributes:
        both: The ordinary removals.
        first: The odd places (the first, the third, …).
        second: The even places.
    """

    both: list[Removal]
    first: list[Removal]
    second: list[Removal]


def halve(both: Sequence[Removal], rankings: Mapping[str, Sequence[str]], training: Sequence[str]) -> Halved:
    """The removals of the halves, of the same pools.

    Args:
        both: The removals of one method and K.
        rankings: Query -> ids, the most influential first.
        training: Ids of the training set.

    Raises:
        ValueError: K is 1, or larger than a ranking.
    """
    method, k, pools = both[0].method, both[0].k, [removal.queries for removal in both]
    if k < 2:
        raise ValueError(f"The top {k} of {method} cannot be cut in two: K must be at least 2.")
    tops = {query: top_of_ranking(rankings[query], k, query) for pool in pools for query in pool}

    def part(start: int) -> list[Removal]:
        chosen = {query: top[start::2] for query, top in tops.items()}
        return plan_removals(method, chosen, len(range(start, k, 2)), pools, training)

    return Halved(list(both), part(0), part(1))


@dataclass(frozen=True)
class Synergy:
    """What the halves do to each query, alone and together.

    Attributes:
        method: The method.
        k: How many of each query.
        queries: The queries.
        first: ΔL without the odd places.
        second: ΔL without the even places.
        both: ΔL without either.
    """

    method: str
    k: int
    queries: tuple[str, ...]
    first: Float[NDArray[np.float64], " q"]
    second: Float[NDArray[np.float64], " q"]
    both: Float[NDArray[np.float64], " q"]

    @property
    def synergy(self) -> Float[NDArray[np.float64], " q"]:
        """What both do beyond the sum of either: above 0 where one half stands in for the other."""
        return self.both - self.first - self.second

    def as_json(self) -> dict[str, Any]:
        """Each query's numbers, and their means and standard errors."""
        numbers = {name: getattr(self, name) for name in _PARTS}
        return {
            "method": self.method,
            "k": self.k,
            "queries": list(self.queries),
            **{name: or_none(values) for name, values in numbers.items()},
            "estimates": {name: or_none(estimate(values)) for name, values in numbers.items()},
        }


def synergy_of(halves: Halved, measured: Measured, seeds: Sequence[int]) -> Synergy:
    """The changes of the queries' losses on the models of their own pools.

    Raises:
        ValueError: A query was not measured after a removal.
    """
    first, second, both = (
        effects(removals, measured, seeds)["loss"] for removals in (halves.first, halves.second, halves.both)
    )
    assert first.queries == second.queries == both.queries
    removal = halves.both[0]
    return Synergy(removal.method, removal.k, both.queries, first.own, second.own, both.own)
