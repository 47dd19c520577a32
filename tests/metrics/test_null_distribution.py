"""p-values against images never trained on: counts, validity, and the family-wise tail."""

from __future__ import annotations

import numpy as np
import pytest

from wherefrom.metrics.null_distribution import family_wise_p_value, p_values


def test_p_values_count_the_null() -> None:
    null = np.array([3.0, 1.0, 2.0, 2.0])
    result = p_values(np.array([0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 9.0]), null)
    assert result.tolist() == [1.0, 1.0, 4 / 5, 4 / 5, 2 / 5, 2 / 5, 1 / 5]


def test_p_values_equal_a_loop() -> None:
    random = np.random.default_rng(0)
    null, scores = random.integers(0, 30, 41).astype(float), random.integers(0, 30, 70).astype(float)
    expected = [(1 + sum(value >= score for value in null)) / 42 for score in scores]
    assert p_values(scores, null).tolist() == expected


def test_p_values_are_valid() -> None:
    # A score from the null itself has p ≤ k / (m + 1) with probability k / (m + 1), for every k.
    random = np.random.default_rng(1)
    noise_samples = random.normal(size=(4000, 20))
    result = np.array([p_values(row[:1], row[1:])[0] for row in noise_samples])
    for k in range(1, 21):
        share = k / 20
        assert abs((result <= share + 1e-12).mean() - share) < 4.5 * np.sqrt(share * (1 - share) / 4000) + 1e-12


def test_an_empty_null_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one image that was never trained on"):
        p_values(np.ones(3), np.empty(0))
    with pytest.raises(ValueError, match=r"at least 10 images.*there are 9"):
        family_wise_p_value(np.ones(3), np.arange(9.0))


@pytest.mark.parametrize("count", [1, 10, 1000])
@pytest.mark.parametrize("best", [4.0, 8.0, 12.0])
def test_the_tail_of_an_exponential_null_is_exact(count: int, best: float) -> None:
    null = -np.log1p(-(np.arange(200_000) + 0.5) / 200_000)
    scores = np.linspace(0.0, best, count) if count > 1 else np.array([best])
    expected = -np.expm1(count * np.log1p(-np.exp(-best)))
    assert family_wise_p_value(scores, null) == pytest.approx(expected, rel=2e-3)
    assert family_wise_p_value(7 + 3 * scores, 7 + 3 * null) == pytest.approx(expected, rel=2e-3)


def test_a_best_score_below_the_tail_is_no_surprise() -> None:
    assert family_wise_p_value(np.array([0.5, 0.85]), np.linspace(0, 1, 101)) == 1.0
    assert family_wise_p_value(np.zeros(5), np.zeros(20)) == 1.0


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_images_never_trained_on_seldom_stand_out(draw: str) -> None:
    random = np.random.default_rng(2)
    sample = getattr(random, draw)
    result = np.array([family_wise_p_value(sample(size=300), sample(size=600)) for _ in range(1000)])
    # The tail is fitted to sixty values, so a few per cent more than five.
    assert (result < 0.05).mean() < 0.09
    assert np.median(result) > 0.2


def test_a_score_far_out_stands_out() -> None:
    random = np.random.default_rng(3)
    null, scores = random.normal(size=600), random.normal(size=300)
    scores[17] = 12.0
    assert family_wise_p_value(scores, null) < 1e-6
