"""Split-half reliability against what it must be for scores of known signal and noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from wherefrom.metrics.reliability import split_half

Values = NDArray[np.float64]


def table(noise: float, noise_samples: int, images: int = 3000) -> Values:
    """Scores of each image at each draw: a signal of variance 1 and independent noise."""
    random = np.random.default_rng(0)
    return random.normal(size=(images, 1)) + noise * random.normal(size=(images, noise_samples))


def reliability(values: Values, seed: int = 0) -> float:
    return split_half(lambda part: values[:, part].mean(axis=1), values.shape[1], seed)


@pytest.mark.parametrize("noise", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("noise_samples", [4, 20])
def test_it_is_the_share_of_signal_in_the_variance(noise: float, noise_samples: int) -> None:
    # Between normal variables Spearman's correlation is 6/π asin(r/2) of Pearson's.
    half = 1 / (1 + noise**2 / (noise_samples / 2))
    spearman = 6 / math.pi * math.asin(half / 2)
    expected = 2 * spearman / (1 + spearman)
    assert reliability(table(noise, noise_samples)) == pytest.approx(expected, abs=0.04)
    # … which is, within 2 %, the squared correlation of the scores with the signal: what reliability means.
    assert expected == pytest.approx(1 / (1 + noise**2 / noise_samples), abs=0.02)


def test_without_noise_it_is_one_and_without_signal_about_zero() -> None:
    assert reliability(table(0.0, 6)) == pytest.approx(1.0)
    assert abs(reliability(np.random.default_rng(1).normal(size=(3000, 8)))) < 0.05


def test_scores_that_contradict_each_other_are_not_reliable() -> None:
    signal = np.random.default_rng(2).normal(size=(100, 1))
    assert reliability(np.concatenate([signal, -signal], axis=1)) == -1.0


def test_it_is_the_same_at_every_call_and_another_with_another_seed() -> None:
    values = table(2.0, 9, 40)
    assert reliability(values) == reliability(values)
    assert reliability(values) != reliability(values, seed=1)


def test_halves_share_no_draw_and_miss_none() -> None:
    seen: list[list[int]] = []

    def score(part: NDArray[np.int64]) -> Values:
        seen.append(part.tolist())
        return np.arange(3.0)

    split_half(score, 7, seed=0, splits=5)
    assert len(seen) == 10
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert sorted(first + second) == list(range(7))
        assert {len(first), len(second)} == {3, 4}
    assert len({tuple(part) for part in seen[::2]}) > 1


@pytest.mark.parametrize("values", [np.ones((5, 1)), np.ones((5, 4))], ids=["one draw", "constant"])
def test_where_it_cannot_be_told_it_is_not_a_number(values: Values) -> None:
    assert math.isnan(reliability(values))
