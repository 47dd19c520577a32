"""Additivity: is the effect of removing two halves of a top K together the sum of their effects alone?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.counterfactual.effects import Measured, removal_effects
from wherefrom.counterfactual.removal import Removal, plan_removals, top_of_ranking
from wherefrom.counterfactual.results_file import or_none
from wherefrom.metrics.standard_error import estimate

_PARTS = ("first", "second", "both", "deviation")


@dataclass(frozen=True)
class HalvedRemovals:
    """The removals of one method and K, and those of the two halves of each query's top K.

    Attributes:
        both: The ordinary removals.
        first: Those of the odd places (the first, the third, …).
        second: Those of the even places.
    """

    both: list[Removal]
    first: list[Removal]
    second: list[Removal]


def halve_removals(
    both: Sequence[Removal], rankings: Mapping[str, Sequence[str]], training: Sequence[str]
) -> HalvedRemovals:
    """The removals of the halves, for the same query groups.

    Args:
        both: The removals of one method and K.
        rankings: Query -> ids, the most influential first.
        training: Ids of the training set.

    Raises:
        ValueError: K is 1, or larger than a ranking.
    """
    method, k, groups = both[0].method, both[0].k, [removal.queries for removal in both]
    if k < 2:
        raise ValueError(f"The top {k} of {method} cannot be cut in two: K must be at least 2.")
    tops = {query: top_of_ranking(rankings[query], k, query) for group in groups for query in group}

    def part(start: int) -> list[Removal]:
        chosen = {query: top[start::2] for query, top in tops.items()}
        return plan_removals(method, chosen, len(range(start, k, 2)), groups, training)

    return HalvedRemovals(list(both), part(0), part(1))


@dataclass(frozen=True)
class Additivity:
    """Effects of the halves on each query's loss, alone and together.

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
    def deviation(self) -> Float[NDArray[np.float64], " q"]:
        """Deviation from additivity, the effect of both minus the sum: above 0 if one half can replace the other."""
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


def measure_additivity(halves: HalvedRemovals, measured: Measured, seeds: Sequence[int]) -> Additivity:
    """Effects on the queries' losses, on the models of their own groups.

    Args:
        halves: The removals.
        measured: The measurements of every query on each model.
        seeds: Seeds of the trainings.

    Raises:
        ValueError: A query was not measured after a removal.
    """
    first, second, both = (
        removal_effects(removals, measured, seeds)["loss"] for removals in (halves.first, halves.second, halves.both)
    )
    assert first.queries == second.queries == both.queries
    removal = halves.both[0]
    return Additivity(
        method=removal.method,
        k=removal.k,
        queries=both.queries,
        first=first.matched,
        second=second.matched,
        both=both.matched,
    )
