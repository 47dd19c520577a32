"""ReplacementPrediction of rankings against scipy and hand-made orders."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from wherefrom.counterfactual.replacement_prediction import evaluate_replacement_prediction

IDS = [f"image {index}" for index in range(30)]


def test_numbers_are_those_of_a_hand_made_case() -> None:
    result = evaluate_replacement_prediction(list("abcdefg"), {"a", "c"}, list("dbgef"), k=2)
    # Left: b d e f g, which are now at the places 1 0 3 4 2.
    assert result.spearman == pytest.approx(1 - 6 * (1 + 1 + 1 + 1 + 4) / (5 * 24))
    assert result.share == 1.0, "b and d were next, and b and d took over"
    assert result.chance == pytest.approx(2 / 5)
    assert evaluate_replacement_prediction(list("abcdefg"), {"a", "c"}, list("gfdeb"), k=2).share == 0.0


def test_spearman_is_scipys() -> None:
    random = np.random.default_rng(0)
    for removed in (0, 3, 28):
        gone = set(IDS[:removed])
        left = [name for name in IDS if name not in gone]
        after = random.permutation(left).tolist()
        expected = spearmanr(np.arange(len(left)), [after.index(name) for name in left]).statistic
        assert evaluate_replacement_prediction(IDS, gone, after, 1).spearman == pytest.approx(expected)


def test_chance_is_the_mean_share_of_random_orders() -> None:
    random = np.random.default_rng(1)
    shares = [
        evaluate_replacement_prediction(IDS, set(IDS[5:10]), random.permutation(IDS[:5] + IDS[10:]).tolist(), 4).share
        for _ in range(2000)
    ]
    chance = evaluate_replacement_prediction(IDS, set(IDS[5:10]), IDS[:5] + IDS[10:], 4).chance
    assert chance == pytest.approx(4 / 25)
    assert np.mean(shares) == pytest.approx(chance, abs=4 * np.std(shares) / 2000**0.5)


def test_nothing_removed_and_nothing_moved_is_predicted_wholly() -> None:
    result = evaluate_replacement_prediction(IDS, (), IDS, 7)
    assert (result.spearman, result.share, result.chance) == (1.0, 1.0, 7 / 30)
    assert evaluate_replacement_prediction(IDS, (), IDS[::-1], 7).spearman == pytest.approx(-1.0)


def test_few_images_that_are_left_are_all_counted() -> None:
    result = evaluate_replacement_prediction(list("abc"), {"a", "b"}, ["c"], 2)
    assert np.isnan(result.spearman)
    assert (result.share, result.chance) == (1.0, 1.0)


@pytest.mark.parametrize("after", [["b"], ["a", "b", "c"], ["b", "b"], ["b", "d"]])
def test_rankings_of_other_images_are_refused(after: list[str]) -> None:
    with pytest.raises(ValueError, match="are not just the 2 of the first ranking that are left"):
        evaluate_replacement_prediction(list("abc"), {"a"}, after, 1)


def test_no_place_and_no_image_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a positive K and an image that is left; given 0 and 3"):
        evaluate_replacement_prediction(list("abc"), (), list("abc"), 0)
    with pytest.raises(ValueError, match="given 1 and 0"):
        evaluate_replacement_prediction(list("a"), {"a"}, [], 1)
