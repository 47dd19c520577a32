"""Which images a retraining leaves out."""

from __future__ import annotations

import pytest

from tests.support.removals import RANKINGS, TRAINING
from wherefrom.counterfactual.removal import Removal, plan_removals, random_removals

# Queries 0 and 1 share their first five images; all others are apart.


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
    group = [tuple(RANKINGS)]
    with pytest.raises(ValueError, match=r"A group of 6 queries would leave out 25 of 200 images, more than 10%"):
        plan_removals("abu", RANKINGS, 5, group, TRAINING)
    plan_removals("abu", RANKINGS, 150, [("query 0",)], TRAINING)  # alone, a query may take what it likes
    with pytest.raises(ValueError, match=r"K is 201, but the ranking of query 'query 0' holds 200 images"):
        plan_removals("abu", RANKINGS, 201, [("query 0",)], TRAINING)
    with pytest.raises(ValueError, match=r"abu ranks 2 images that are not in the training set, such as 'picture/010'"):
        plan_removals("abu", RANKINGS, 2, [("query 0",)], TRAINING[50:])
    with pytest.raises(ValueError, match="holds an image twice"):
        plan_removals("abu", {"query": ["a", "a"]}, 2, [("query",)], ["a"])
