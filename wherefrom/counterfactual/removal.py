"""Which images to leave out of a retraining, and what the retrained models then say.

The papers retrain once for each query, method and K (AbU, section 5.1). Pooled, one retraining leaves out the top K of
several queries and is measured on all of them *and* on queries whose images stayed. The headline is own minus others,
so that a method which names generally important images does not win. It assumes that leaving out another query's
images does to a query what it does to any other; the queries of a pool are therefore chosen to share few images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from wherefrom.runtime.keyed_random import hash_text

RANDOM = "random"  # the method of removals by chance
MOST_REMOVED = 0.1  # of the training set, by one pool


@dataclass(frozen=True)
class Removal:
    """One retraining's images.

    Attributes:
        method: Whose ranking named them.
        k: How many of each query.
        queries: The queries whose top images they are.
        ids: The images, sorted.
    """

    method: str
    k: int
    queries: tuple[str, ...]
    ids: tuple[str, ...]


def pool_queries(tops: Mapping[str, frozenset[str]], size: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Cuts the queries into pools whose top images overlap little.

    A pool is opened by the first query that is left, in an order by hash, and filled with those that add the fewest
    images which the pool already has.

    Args:
        tops: Query -> its top images, by one method or by several.
        size: Queries in a pool; the last may have fewer.
        seed: Seed of the order.

    Raises:
        ValueError: `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"A pool needs at least one query; given {size}.")
    left = sorted(tops, key=lambda query: hash_text(f"pools/{seed}/{query}"))
    pools = []
    while left:
        pool = [left.pop(0)]
        union = set(tops[pool[0]])
        while left and len(pool) < size:
            best = min(left, key=lambda query: (len(tops[query] & union), left.index(query)))
            left.remove(best)
            pool.append(best)
            union |= tops[best]
        pools.append(tuple(pool))
    return pools


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
    method: str, rankings: Mapping[str, Sequence[str]], k: int, pools: Sequence[Sequence[str]], training: Sequence[str]
) -> list[Removal]:
    """The images that each pool's retraining leaves out.

    Args:
        method: Whose rankings these are.
        rankings: Query -> image ids, the most influential first.
        k: How many of each query.
        pools: The queries of each retraining.
        training: Ids of the training set.

    Raises:
        ValueError: A pool would leave out more than a tenth of the training set, an image is not in it, or `k` is
            larger than a ranking.
    """
    known, result = set(training), []
    for pool in pools:
        ids = sorted({name for query in pool for name in top_of_ranking(rankings[query], k, query)})
        unknown = [name for name in ids if name not in known]
        if unknown:
            raise ValueError(
                f"{method} ranks {len(unknown)} images that are not in the training set, such as {unknown[0]!r}: "
                "these rankings were made for another data set."
            )
        if len(pool) > 1 and len(ids) > MOST_REMOVED * len(known):
            raise ValueError(
                f"A pool of {len(pool)} queries would leave out {len(ids)} of {len(known)} images, more than "
                f"{MOST_REMOVED:.0%}: choose a smaller pool or K."
            )
        result.append(Removal(method, k, tuple(pool), tuple(ids)))
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


def random_ladder(counts: Sequence[int], noise_samples: int, training: Sequence[str]) -> list[Removal]:
    """Removals by chance of so many images each, about no query: the ladder of `random_equivalent`.

    Each draw's removals are nested: more images go on each rung.

    Args:
        counts: Images left out on each rung.
        noise_samples: Models on each rung.
        training: Ids of the training set.

    Raises:
        ValueError: A count is not positive, or nothing would be left to train on.
    """
    odd = [count for count in counts if not 0 < count < len(training)]
    if odd:
        raise ValueError(f"A ladder of {len(training)} images has rungs between 1 and one less; given {odd[0]}.")
    result = []
    for count in counts:
        for draw in range(noise_samples):
            order = sorted(training, key=lambda name: hash_text(f"random ladder/{draw}/{name}"))
            result.append(Removal(RANDOM, count, (), tuple(sorted(order[:count]))))
    return result


@dataclass(frozen=True)
class Effect:
    """What the retrainings did to each query, in the order of the queries.

    Attributes:
        queries: The queries.
        own: Mean change where the query's own images were left out.
        others: Mean change where only those of other queries were. Where one pool takes all queries there is no such
            retraining: then the mean change, on the same models, of the queries that nothing was left out for; NaN
            without such queries.
    """

    queries: tuple[str, ...]
    own: Float[NDArray[np.float64], " q"]
    others: Float[NDArray[np.float64], " q"]

    @property
    def difference(self) -> Float[NDArray[np.float64], " q"]:
        """Own minus others."""
        return self.own - self.others


def effect_of(removals: Sequence[Removal], changes: Sequence[Mapping[str, float]]) -> Effect:
    """Own and others' changes of each query that some removal is about.

    Args:
        removals: The removals of one method and K.
        changes: For each of them, query -> change of what was measured (a loss, a deviation).

    Raises:
        ValueError: A query was not measured after a removal.
    """
    queries = tuple(sorted({query for removal in removals for query in removal.queries}))
    bystanders = sorted(set.intersection(*map(set, changes)) - set(queries)) if changes else []
    own: list[float] = []
    others: list[float] = []
    for query in queries:
        missing = [removal for removal, change in zip(removals, changes, strict=True) if query not in change]
        if missing:
            raise ValueError(f"Query {query!r} was not measured after a removal by {missing[0].method}.")
        pairs = [(query in removal.queries, change) for removal, change in zip(removals, changes, strict=True)]
        own.append(float(np.mean([change[query] for mine, change in pairs if mine])))
        left = [change[query] for mine, change in pairs if not mine]
        left = left or [change[bystander] for _, change in pairs for bystander in bystanders]
        others.append(float(np.mean(left)) if left else float("nan"))
    return Effect(queries, np.array(own), np.array(others))


def random_equivalent(
    counts: Sequence[int], changes: Sequence[Sequence[float]], target: float, noise_samples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """How many random images must go for the same change, and a 95 % interval (AbU, section 5.1).

    The mean changes on the ladder are made monotone by isotonic regression and joined by straight lines, from no change
    at no images; the interval comes from drawing each rung's models anew. Beyond the ladder's end the answer is
    infinite.

    Args:
        counts: Images left out on each rung, rising.
        changes: Changes of the models on each rung.
        target: The change to match.
        noise_samples: Bootstrap draws.
        seed: Their seed.

    Raises:
        ValueError: The counts do not rise from above 0, or a rung has no model.
    """
    rungs = [np.asarray(rung, dtype=np.float64) for rung in changes]
    if len(counts) != len(rungs) or not counts or counts[0] <= 0 or np.any(np.diff(counts) <= 0):
        raise ValueError(f"The ladder's counts must rise from above 0, one for each rung; given {list(counts)}.")
    if any(len(rung) == 0 for rung in rungs):
        raise ValueError("A rung of the ladder has no model.")
    sizes = np.array([len(rung) for rung in rungs], dtype=np.float64)

    def solve(means: Float[NDArray[np.float64], " r"]) -> float:
        return _crossing(np.array([0, *counts], dtype=np.float64), np.array([0.0, *_isotonic(means, sizes)]), target)

    random = np.random.default_rng(seed)
    drawn = [solve(np.array([random.choice(rung, len(rung)).mean() for rung in rungs])) for _ in range(noise_samples)]
    low, high = np.quantile(drawn, (0.025, 0.975), method="closest_observation")
    return solve(np.array([rung.mean() for rung in rungs])), float(low), float(high)


def _isotonic(
    values: Float[NDArray[np.float64], " r"], weights: Float[NDArray[np.float64], " r"]
) -> Float[NDArray[np.float64], " r"]:
    fitted: Float[NDArray[np.float64], " r"] = isotonic_regression(np.maximum(values, 0.0), weights=weights).x
    return fitted


def _crossing(x: Float[NDArray[np.float64], " r"], y: Float[NDArray[np.float64], " r"], target: float) -> float:
    """Where the rising line first reaches the target."""
    if target <= 0:
        return 0.0
    above = np.flatnonzero(y >= target)
    if len(above) == 0:
        return float("inf")
    right = int(above[0])
    left = right - 1
    return float(x[left] + (target - y[left]) / (y[right] - y[left]) * (x[right] - x[left]))
