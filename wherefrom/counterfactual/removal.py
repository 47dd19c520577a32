"""Removals: the images that a retraining leaves out.

The papers retrain once for each query, method and K (AbU, section 5.1). With query groups, one retraining leaves out
the top K of several queries and is measured on all of them *and* on queries whose images stayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wherefrom.runtime.keyed_random import hash_text

RANDOM = "random"  # the method of removals at random
MOST_REMOVED = 0.1  # of the training set, for one query group


@dataclass(frozen=True)
class Removal:
    """The images that one retraining leaves out.

    Attributes:
        method: The method whose ranking named them.
        k: How many of each query.
        queries: The queries whose top images they are.
        ids: The images, sorted.
    """

    method: str
    k: int
    queries: tuple[str, ...]
    ids: tuple[str, ...]


def top_of_ranking(ids: Sequence[str], k: int, query: str) -> list[str]:
    """The first k of a ranking.

    Raises:
        ValueError: `k` is not positive or larger than the ranking, or the ranking holds an image twice.
    """
    if not 1 <= k <= len(ids):
        raise ValueError(f"K is {k}, but the ranking of query {query!r} holds {len(ids)} images.")
    top = list(ids[:k])
    if len(set(top)) < k:
        raise ValueError(f"The ranking of query {query!r} holds an image twice.")
    return top


def plan_removals(
    method: str, rankings: Mapping[str, Sequence[str]], k: int, groups: Sequence[Sequence[str]], training: Sequence[str]
) -> list[Removal]:
    """The images that the retraining of each query group leaves out.

    Args:
        method: The method whose rankings these are.
        rankings: Query -> image ids, the most influential first.
        k: How many of each query.
        groups: The queries of each retraining.
        training: Ids of the training set.

    Raises:
        ValueError: A query group would leave out more than a tenth of the training set, an image is not in it, or `k`
            is larger than a ranking.
    """
    known, result = set(training), []
    for group in groups:
        ids = sorted({name for query in group for name in top_of_ranking(rankings[query], k, query)})
        unknown = [name for name in ids if name not in known]
        if unknown:
            raise ValueError(
                f"{method} ranks {len(unknown)} images that are not in the training set, such as {unknown[0]!r}: "
                "these rankings were made for another data set."
            )
        if len(group) > 1 and len(ids) > MOST_REMOVED * len(known):
            raise ValueError(
                f"A group of {len(group)} queries would leave out {len(ids)} of {len(known)} images, more than "
                f"{MOST_REMOVED:.0%}: choose a smaller query group or K."
            )
        result.append(Removal(method, k, tuple(group), tuple(ids)))
    return result


def random_removals(like: Sequence[Removal], training: Sequence[str], seed: int) -> list[Removal]:
    """As many images as each of these removals, chosen by hash, for the same queries.

    Args:
        like: The removals of a method.
        training: Ids of the training set.
        seed: Seed of the choice.
    """
    result = []
    for removal in like:
        salt = f"random removal/{seed}/{removal.k}/{'/'.join(removal.queries)}"
        order = sorted(training, key=lambda name: hash_text(f"{salt}/{name}"))
        result.append(Removal(RANDOM, removal.k, removal.queries, tuple(sorted(order[: len(removal.ids)]))))
    return result


def by_method(removals: Sequence[Removal]) -> list[list[Removal]]:
    """The removals of each method and K."""
    result: dict[tuple[str, int], list[Removal]] = {}
    for removal in removals:
        result.setdefault((removal.method, removal.k), []).append(removal)
    return list(result.values())
