"""Protocols that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from wherefrom.counterfactual.protocol import Protocol


def test_groups_need_two_images_each() -> None:
    with pytest.raises(ValueError, match=r"every K must be at least 2; given ks \[4, 1\]"):
        Protocol(ks=[4, 1], additivity_groups=True)
    assert Protocol(ks=[2], additivity_groups=True).additivity_groups


def test_rounds_divide_every_k() -> None:
    with pytest.raises(ValueError, match="in 4 equal rounds, which 6 cannot be cut into"):
        Protocol(ks=[8, 6], iterative_removal_rounds=4)
    assert Protocol(ks=[8, 6], iterative_removal_rounds=2).iterative_removal_rounds == 2


@pytest.mark.parametrize("settings", [{"reattributed_queries": -1}, {"iterative_removal_rounds": -1}])
def test_negative_numbers_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="reattributed_queries and iterative_removal_rounds must not be negative"):
        Protocol(**settings)


@pytest.mark.parametrize("settings", [{"timesteps": 0}, {"random_removal_curve": [1], "random_removal_samples": 0}])
def test_numbers_that_must_be_positive(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive; given 0"):
        Protocol(**settings)
