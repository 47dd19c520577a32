"""Plan of a counterfactual evaluation: the removals of all methods, and as many at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wherefrom.counterfactual.protocol import Protocol
from wherefrom.counterfactual.query_groups import group_queries
from wherefrom.counterfactual.removal import RANDOM, Removal, plan_removals, random_removals, top_of_ranking
from wherefrom.counterfactual.results_file import RESERVED


def plan_evaluation(
    rankings: Mapping[str, Mapping[str, Sequence[str]]], protocol: Protocol, training: Sequence[str]
) -> list[Removal]:
    """All removals of all methods and K, and as many at random.

    All methods share their query groups, so that they are compared on the same mismatched queries. The first method
    decides the groups: a method that is added later changes no model of the others.

    Args:
        rankings: Method -> query -> image ids, the most influential first.
        protocol: The protocol.
        training: Ids of the training set.

    Raises:
        ValueError: K is larger than a ranking, a query group would leave out too much, a ranking is of another data
            set, or a method has the name of one of the table's own rows.
    """
    reserved = (RESERVED | {RANDOM}) & set(rankings)
    if reserved:
        raise ValueError(
            f"A method is called {min(reserved)!r}, which the evaluation's own results use: rename its file."
        )
    first_method = next(iter(rankings.values()))
    result: list[Removal] = []
    for k, size in protocol.stages():
        tops = {query: frozenset(top_of_ranking(ids, k, query)) for query, ids in first_method.items()}
        groups = group_queries(tops, size)
        first: list[Removal] = []
        for method, by in rankings.items():
            removals = plan_removals(method, by, k, groups, training)
            first = first or removals
            result += removals
        for sample in range(protocol.random):
            result += random_removals(first, training, sample)
    return result
