"""Concentration of influence: closed forms, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest

from wherefrom.metrics.concentration import concentration


def test_closed_forms() -> None:
    result = concentration(np.array([3.0, -5.0, 1.0, 0.0]), tops=(1, 2, 10))
    assert result.shares == {1: 0.75, 2: 1.0, 10: 1.0}
    assert result.effective == pytest.approx(16 / 10)
    alike = concentration(np.full(250, 0.3))
    assert alike.shares == pytest.approx({1: 1 / 250, 10: 10 / 250, 100: 100 / 250})
    assert alike.effective == pytest.approx(250)
    alone = concentration(np.array([0.0, 7.0, 0.0]))
    assert (alone.shares[1], alone.effective) == (1.0, 1.0)


def test_exponential_scores_have_half_their_number() -> None:
    # (Σw)² / Σw² of n exponential weights is n · 1² / 2.
    scores = np.random.default_rng(0).exponential(size=200_000)
    assert concentration(scores).effective == pytest.approx(100_000, rel=0.01)


def test_unit_and_order_do_not_matter() -> None:
    random = np.random.default_rng(1)
    scores = random.normal(size=500)
    expected = concentration(scores)
    for changed in (random.permutation(scores), scores * 1e-200, np.concatenate([scores, -np.ones(99)])):
        result = concentration(changed)
        assert result.shares == pytest.approx(dict(expected.shares), rel=1e-9)
        assert result.effective == pytest.approx(expected.effective, rel=1e-9)


def test_without_influence_there_is_nothing_to_hold() -> None:
    result = concentration(np.array([-1.0, 0.0]))
    assert np.isnan(result.shares[1])
    assert result.effective == 0.0


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="Score 1 is not finite"):
        concentration(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match=r"must be positive; given \[0\]"):
        concentration(np.array([1.0]), tops=(0,))
