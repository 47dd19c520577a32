"""Shares of groups: closed forms, a brute-force bootstrap, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from wherefrom.metrics.group_shares import Share, group_shares


def _sample(seed: int, count: int = 60) -> tuple[NDArray[np.float64], list[str]]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=count), [f"g{index}" for index in generator.integers(4, size=count)]


def _brute_force(scores: NDArray[np.float64], groups: list[str], top: int) -> dict[str, float]:
    """Shares of images without ties, one image after the other."""
    median = float(np.median(scores))
    ranked = sorted(zip(scores, groups, strict=True), reverse=True)[:top]
    masses = dict.fromkeys(sorted(set(groups)), 0.0)
    for score, group in ranked:
        masses[group] += max(float(score) - median, 0.0)
    return {group: mass / sum(masses.values()) for group, mass in masses.items()}


def test_closed_form() -> None:
    # Median 0; the top three have masses 6 (a), 3 (b), 1 (a); c is never in the top.
    scores = np.array([6.0, 3.0, 1.0, 0.0, -1.0, -2.0, -3.0])
    shares = group_shares(scores, groups=["a", "b", "a", "c", "c", "c", "b"], top=3)
    assert [(each.name, each.share) for each in shares] == [("a", 0.7), ("b", 0.3), ("c", 0.0)]
    assert [each.expected for each in shares] == [2 / 7, 2 / 7, 3 / 7]


@pytest.mark.parametrize("top", [1, 5, 29, 60])
def test_brute_force(top: int) -> None:
    scores, groups = _sample(0)
    shares = group_shares(scores, groups=groups, top=top)
    wanted = _brute_force(scores, groups, top)
    assert {each.name: each.share for each in shares} == pytest.approx(wanted, abs=1e-12)
    assert sum(each.share for each in shares) == pytest.approx(1.0)
    assert [each.share for each in shares] == sorted((each.share for each in shares), reverse=True)


def test_images_below_the_median_have_no_mass() -> None:
    scores, groups = _sample(1)
    assert group_shares(scores, groups=groups, top=30) == group_shares(scores, groups=groups, top=60)


def test_bootstrap_is_that_of_real_resampled_data() -> None:
    """The intervals equal those of shares recomputed from explicitly drawn images, with the ties that this makes."""
    scores, groups = _sample(2, count=25)
    order = np.lexsort((np.unique(groups, return_inverse=True)[1], -scores))
    generator = np.random.default_rng(7)
    drawn = []
    for _ in range(200):
        positions = order[generator.integers(25, size=25)]
        again = scores[positions]
        # Copies of one image tie with themselves only, so the order among equals cannot matter here.
        drawn.append(_brute_force(again, [groups[position] for position in positions], top=6))
    for each in group_shares(scores, groups=groups, top=6, seed=7, resamples=200):
        column = [shares.get(each.name, 0.0) for shares in drawn]
        assert (each.low, each.high) == pytest.approx(tuple(np.quantile(column, [0.025, 0.975])), abs=1e-12)


def test_interval_covers_the_truth() -> None:
    """Over many samples of a known population the 95 % interval holds the population's share about that often."""
    inside = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        groups = ["a" if uniform < 0.3 else "b" for uniform in generator.random(200)]
        shares = group_shares(generator.exponential(size=200), groups=groups, top=100, resamples=200)
        (share,) = [each for each in shares if each.name == "a"]
        inside += share.low <= 0.3 <= share.high
    assert inside >= 34  # 38 expected; fewer than 34 have a probability of 1 %, and the seeds are fixed


def test_more_images_narrow_the_interval() -> None:
    widths = []
    for count in (60, 960):
        scores, groups = _sample(3, count)
        widths.append(np.mean([each.high - each.low for each in group_shares(scores, groups=groups, top=count // 4)]))
    assert widths[1] < 0.5 * widths[0]  # 1/4 by the square-root law


def test_invariances() -> None:
    scores, groups = _sample(4)
    scores = np.round(scores, 1)  # with ties
    shares = group_shares(scores, groups=groups, top=10)
    permuted = np.random.default_rng(0).permutation(len(scores))
    assert group_shares(scores[permuted], groups=[groups[index] for index in permuted], top=10) == shares
    assert group_shares(scores, groups=groups, top=10, seed=1) != shares
    for one, other in zip(shares, group_shares(8 * scores + 4, groups=groups, top=10), strict=True):
        assert (one.name, one.expected) == (other.name, other.expected)
        assert (one.share, one.low, one.high) == pytest.approx((other.share, other.low, other.high), abs=1e-12)


def test_ties_at_the_edge_share_what_is_left() -> None:
    # One place is left for three images with the same score: each gets a third of it.
    scores = np.array([4.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    shares = {each.name: each.share for each in group_shares(scores, groups=list("abbcddddd"), top=2)}
    assert shares == pytest.approx({"a": 4 / 6, "b": 2 * 2 / 3 / 6, "c": 2 / 3 / 6, "d": 0.0})


def test_draws_without_influence_are_left_out() -> None:
    # With two images, half of all draws hold one of them twice and nothing exceeds the median.
    assert group_shares(np.array([1.0, 0.0]), groups=["a", "b"], top=1) == [
        Share("a", 1.0, 1.0, 1.0, 0.5),
        Share("b", 0.0, 0.0, 0.0, 0.5),
    ]


def test_equal_shares_are_ordered_by_what_was_expected_then_name() -> None:
    scores = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
    assert [each.name for each in group_shares(scores, groups=list("azzyc"), top=1)] == ["a", "z", "c", "y"]


@pytest.mark.parametrize(
    ("scores", "groups", "changes", "message"),
    [
        ([1.0, 0.0], ["a"], {}, "one score and one group"),
        ([], [], {}, "one score and one group"),
        ([1.0, np.nan], ["a", "b"], {}, "position 1 is nan"),
        ([np.inf, 0.0], ["a", "b"], {}, "position 0 is inf"),
        ([1.0, 0.0], ["a", "b"], {"top": 0}, "top is 0"),
        ([1.0, 0.0], ["a", "b"], {"top": 3}, "top is 3"),
        ([1.0, 0.0], ["a", "b"], {"resamples": 5}, "resamples"),
        ([1.0, 0.0], ["a", "b"], {"confidence": 1.0}, "confidence"),
        ([2.0, 2.0], ["a", "b"], {}, "no influence to divide"),
    ],
)
def test_refuses(scores: list[float], groups: list[str], changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_shares(np.array(scores), groups=groups, **{"top": 1, **changes})  # type: ignore[arg-type]
