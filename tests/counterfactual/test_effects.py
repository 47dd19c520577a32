"""Matched and mismatched effects of removals."""

from __future__ import annotations

import numpy as np
import pytest

from wherefrom.counterfactual.effects import matched_and_mismatched
from wherefrom.counterfactual.removal import Removal


def test_matched_minus_mismatched_by_hand() -> None:
    removals = [Removal("abu", 1, ("a", "b"), ("1",)), Removal("abu", 1, ("c",), ("2",))]
    effects = [{"a": 5.0, "b": 2.0, "c": 1.0}, {"a": 2.0, "b": 0.5, "c": 7.0}]
    effect = matched_and_mismatched(removals, effects)
    assert effect.queries == ("a", "b", "c")
    assert effect.matched.tolist() == [5.0, 2.0, 7.0]
    assert effect.mismatched.tolist() == [2.0, 0.5, 1.0]
    assert effect.difference.tolist() == [3.0, 1.5, 6.0]
    alone = matched_and_mismatched([Removal("abu", 1, ("a",), ("1",))], [{"a": 5.0}])
    assert np.isnan(alone.difference).all()
    # One group takes both queries; d and e are measured, and nothing was left out for them.
    grouped = matched_and_mismatched(
        [Removal("abu", 1, ("a", "b"), ("1",))], [{"a": 5.0, "b": 2.0, "d": 1.0, "e": 0.0}]
    )
    assert grouped.mismatched.tolist() == [0.5, 0.5]
    assert grouped.difference.tolist() == [4.5, 1.5]
    with pytest.raises(ValueError, match="Query 'c' was not measured after a removal by abu"):
        matched_and_mismatched(removals, [effects[0], {"a": 1.0, "b": 1.0}])
