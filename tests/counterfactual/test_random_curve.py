"""How many random images have the same effect."""

from __future__ import annotations

import numpy as np
import pytest

from wherefrom.counterfactual.random_curve import random_equivalent


def test_random_equivalents_are_read_off_the_curve() -> None:
    counts, curve = [10, 20, 40], [[0.9, 1.1], [2.0, 2.0], [6.0]]
    assert random_equivalent(counts, curve, 1.5)[0] == pytest.approx(15.0)
    assert random_equivalent(counts, curve, 4.0)[0] == pytest.approx(30.0)
    assert random_equivalent(counts, curve, 0.5)[0] == pytest.approx(5.0)
    assert random_equivalent(counts, curve, 0.0)[0] == 0.0
    assert random_equivalent(counts, curve, 6.5)[0] == np.inf
    value, low, high = random_equivalent(counts, curve, 1.5)
    assert low <= value <= high
    assert (low, high) == pytest.approx((10 + 10 * 0.4 / 0.9, 10 + 10 * 0.6 / 1.1), rel=0.2)
    # 3 and 1 contradict each other: together they are 2, 2.
    assert random_equivalent([10, 20, 40], [[3.0], [1.0], [4.0]], 3.0)[0] == pytest.approx(30.0)
    with pytest.raises(ValueError, match=r"must rise from above 0.*given \[20, 10\]"):
        random_equivalent([20, 10], [[1.0], [2.0]], 1.0)
    with pytest.raises(ValueError, match="has no model"):
        random_equivalent([10], [[]], 1.0)
