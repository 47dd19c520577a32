"""Rank correlations of methods' scores, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from wherefrom.metrics.rank_correlation import correlations


def test_correlations_are_means_over_the_queries() -> None:
    array = np.array
    a, b = [1.0, 2, 3, 4, 5, 6], [2.0, 1, 4, 3, 6, 5]
    mean, error, count = correlations({"x": [array(a), array(a)], "y": [array(b), array(a[::-1])]})
    result = [spearmanr(a, b).statistic, -1.0]
    assert mean[0, 1] == mean[1, 0] == pytest.approx(np.mean(result))
    assert error[0, 1] == pytest.approx(np.std(result, ddof=1) / 2**0.5)
    assert mean[0, 0] == mean[1, 1] == 1.0
    assert (count == 2).all()
    constant, _, none = correlations({"x": [array(a)], "flat": [array([1.0] * 6)]})
    assert np.isnan(constant[0, 1])
    assert none[0, 1] == 0
