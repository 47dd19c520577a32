"""Which images a retraining leaves out, and what its changes mean."""

from __future__ import annotations

import numpy as np
import pytest

from wherefrom.counterfactual.removal import (
    Removal,
    effect_of,
    plan_removals,
    pool_queries,
    random_equivalent,
    random_removals,
)

TRAINING = [f"picture/{index:03d}" for index in range(200)]
# Queries 0 and 1 share their first five images; all others are apart.
RANKINGS = {f"query {index}": TRAINING[10 * max(1, index) :] + TRAINING[: 10 * max(1, index)] for index in range(6)}


def test_a_pool_holds_queries_that_share_few_images() -> None:
    tops = {query: frozenset(ids[:5]) for query, ids in RANKINGS.items()}
    pools = pool_queries(tops, size=2)
    assert sorted(query for pool in pools for query in pool) == sorted(RANKINGS)
    assert all({"query 0", "query 1"} != set(pool) for pool in pools)
    assert pool_queries(dict(reversed(tops.items())), size=2) == pools, "the order they come in is not used"
    assert [len(pool) for pool in pool_queries(tops, size=4)] == [4, 2]


def test_a_removal_is_the_union_of_its_queries_tops() -> None:
    (removal,) = plan_removals("abu", RANKINGS, 3, [("query 0", "query 1", "query 3")], TRAINING)
    expected = [TRAINING[index] for index in (10, 11, 12, 30, 31, 32)]
    assert removal == Removal("abu", 3, ("query 0", "query 1", "query 3"), tuple(expected))
    (random,) = random_removals([removal], TRAINING, seed=1)
    assert (random.method, random.k, random.queries, len(set(random.ids))) == ("random", 3, removal.queries, 6)
    assert set(random.ids) <= set(TRAINING)
    (other,) = random_removals([removal], TRAINING, seed=2)
    assert other.ids != random.ids


def test_removals_that_cannot_be_are_refused() -> None:
    pool = [tuple(RANKINGS)]
    with pytest.raises(ValueError, match=r"A pool of 6 queries would leave out 25 of 200 images, more than 10%"):
        plan_removals("abu", RANKINGS, 5, pool, TRAINING)
    plan_removals("abu", RANKINGS, 150, [("query 0",)], TRAINING)  # alone, a query may take what it likes
    with pytest.raises(ValueError, match=r"K is 201, but the ranking of query 'query 0' holds 200 images"):
        plan_removals("abu", RANKINGS, 201, [("query 0",)], TRAINING)
    with pytest.raises(ValueError, match=r"abu ranks 2 images that are not in the training set, such as 'picture/010'"):
        plan_removals("abu", RANKINGS, 2, [("query 0",)], TRAINING[50:])
    with pytest.raises(ValueError, match="holds an image twice"):
        plan_removals("abu", {"query": ["a", "a"]}, 2, [("query",)], ["a"])
    with pytest.raises(ValueError, match="at least one query; given 0"):
        pool_queries({}, 0)


def test_own_minus_others_by_hand() -> None:
    removals = [Removal("abu", 1, ("a", "b"), ("1",)), Removal("abu", 1, ("c",), ("2",))]
    changes = [{"a": 5.0, "b": 2.0, "c": 1.0}, {"a": 2.0, "b": 0.5, "c": 7.0}]
    effect = effect_of(removals, changes)
    assert effect.queries == ("a", "b", "c")
    assert effect.own.tolist() == [5.0, 2.0, 7.0]
    assert effect.others.tolist() == [2.0, 0.5, 1.0]
    assert effect.difference.tolist() == [3.0, 1.5, 6.0]
    alone = effect_of([Removal("abu", 1, ("a",), ("1",))], [{"a": 5.0}])
    assert np.isnan(alone.difference).all()
    # One pool takes both queries; d and e are measured, and nothing was left out for them.
    pooled = effect_of([Removal("abu", 1, ("a", "b"), ("1",))], [{"a": 5.0, "b": 2.0, "d": 1.0, "e": 0.0}])
    assert pooled.others.tolist() == [0.5, 0.5]
    assert pooled.difference.tolist() == [4.5, 1.5]
    with pytest.raises(ValueError, match="Query 'c' was not measured after a removal by abu"):
        effect_of(removals, [changes[0], {"a": 1.0, "b": 1.0}])


def test_random_equivalents_are_read_off_the_ladder() -> None:
    counts, ladder = [10, 20, 40], [[0.9, 1.1], [2.0, 2.0], [6.0]]
    assert random_equivalent(counts, ladder, 1.5)[0] == pytest.approx(15.0)
    assert random_equivalent(counts, ladder, 4.0)[0] == pytest.approx(30.0)
    assert random_equivalent(counts, ladder, 0.5)[0] == pytest.approx(5.0)
    assert random_equivalent(counts, ladder, 0.0)[0] == 0.0
    assert random_equivalent(counts, ladder, 6.5)[0] == np.inf
    value, low, high = random_equivalent(counts, ladder, 1.5)
    assert low <= value <= high
    assert (low, high) == pytest.approx((10 + 10 * 0.4 / 0.9, 10 + 10 * 0.6 / 1.1), rel=0.2)
    # 3 and 1 contradict each other: together they are 2, 2.
    assert random_equivalent([10, 20, 40], [[3.0], [1.0], [4.0]], 3.0)[0] == pytest.approx(30.0)
    with pytest.raises(ValueError, match=r"must rise from above 0.*given \[20, 10\]"):
        random_equivalent([20, 10], [[1.0], [2.0]], 1.0)
    with pytest.raises(ValueError, match="has no model"):
        random_equivalent([10], [[]], 1.0)
