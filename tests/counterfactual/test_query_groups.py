"""Queries that share a retraining."""

from __future__ import annotations

import pytest

from tests.support.removals import RANKINGS
from wherefrom.counterfactual.query_groups import group_queries


def test_a_group_holds_queries_that_share_few_images() -> None:
    tops = {query: frozenset(ids[:5]) for query, ids in RANKINGS.items()}
    groups = group_queries(tops, size=2)
    assert sorted(query for group in groups for query in group) == sorted(RANKINGS)
    assert all({"query 0", "query 1"} != set(group) for group in groups)
    assert group_queries(dict(reversed(tops.items())), size=2) == groups, "the order they come in is not used"
    assert [len(group) for group in group_queries(tops, size=4)] == [4, 2]


def test_groups_without_a_query_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one query; given 0"):
        group_queries({}, 0)
