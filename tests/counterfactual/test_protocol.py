"""What the judge refuses to be asked."""

from __future__ import annotations

import pytest

from wherefrom.counterfactual.protocol import Protocol


def test_groups_need_two_images_each() -> None:
    with pytest.raises(ValueError, match=r"every K must be at least 2; given ks \[4, 1\]"):
        Protocol(ks=[4, 1], groups=True)
    assert Protocol(ks=[2], groups=True).groups


def test_rounds_divide_every_k() -> None:
    with pytest.raises(ValueError, match="in 4 equal rounds, which 6 cannot be cut into"):
        Protocol(ks=[8, 6], greedy=4)
    assert Protocol(ks=[8, 6], greedy=2).greedy == 2


@pytest.mark.parametrize("settings", [{"after": -1}, {"greedy": -1}])
def test_negative_numbers_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="after and greedy must not be negative"):
        Protocol(**settings)
