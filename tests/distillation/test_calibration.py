"""Calibration: closed forms, brute force, coverage on planted data, invariances, and the file."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom

from wherefrom.distillation.calibration import (
    CURVE,
    Calibration,
    CalibrationSettings,
    calibrate,
    calibration_identity,
    evaluate_calibration,
    fit_calibration,
    group_quantile,
    load_calibration,
    save_calibration,
)
from wherefrom.distillation.embedding_similarity import similarities
from wherefrom.distillation.ranker import Ranker
from wherefrom.distillation.teacher_set import Features, TeacherSet
from wherefrom.runtime.artifacts import ArtifactMismatchError

Arrays = tuple[NDArray[np.float64], NDArray[np.float64], list[str]]


def planted(seed: int, queries: int, images: int = 20, first: int = 0) -> Arrays:
    """Influence rises with similarity; noise grows with it; every query has a shift and a size of noise of its own."""
    random = np.random.default_rng(seed)
    cosines = random.uniform(-1, 1, size=(queries, images))
    shift, size = random.normal(size=(queries, 1)), random.exponential(size=(queries, 1))
    scores = np.exp(2 * cosines) + 0.5 * shift + size * (1.2 + cosines) * random.normal(size=cosines.shape)
    return cosines, scores, [f"query {first + index}" for index in range(queries)]


def test_the_curve_of_four_points_by_hand() -> None:
    # Pool adjacent violators: 1, (4, 2) -> 3, 5; every query has the same four images.
    settings = CalibrationSettings(confidence=0.5, shares=())
    cosines = np.tile([0.1, 0.2, 0.3, 0.9], (8, 1))
    scores = np.tile([1.0, 4.0, 2.0, 5.0], (8, 1))
    result = fit_calibration(cosines, scores, [f"q{index}" for index in range(8)], settings)
    assert result.similarities.tolist() == [0.1, 0.2, 0.3, 0.9]
    assert result.values.tolist() == [1.0, 3.0, 3.0, 5.0]
    estimates = result.estimate(np.array([-1.0, 0.15, 0.25, 0.6, 1.0]))
    assert estimates.values == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0])
    # Residuals are 0, 1, -1, 0 in each of four other queries; 3/4 of five groups' mass is 15 of 16 values: the largest.
    assert estimates.low - estimates.values == pytest.approx(np.full(5, -1.0))
    assert estimates.high - estimates.values == pytest.approx(np.full(5, 1.0))


def test_equal_similarities_have_one_estimate() -> None:
    settings = CalibrationSettings(confidence=0.5, shares=())
    cosines = np.tile([0.5, 0.5, 0.7], (6, 1))
    scores = np.tile([0.0, 2.0, 3.0], (6, 1))
    result = fit_calibration(cosines, scores, list("abcdef"), settings)
    assert result.estimate(np.array([0.5, 0.7])).values.tolist() == [1.0, 3.0]


def _least_rising(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Isotonic regression by its min-max formula."""
    y = y[np.argsort(x)]
    count = len(y)
    return np.array(
        [
            max(min(y[start : stop + 1].mean() for stop in range(index, count)) for start in range(index + 1))
            for index in range(count)
        ]
    )


def test_the_curve_is_the_nearest_rising_one() -> None:
    cosines, scores, names = planted(0, 8, 6)
    settings = CalibrationSettings(confidence=0.5, shares=())
    result = fit_calibration(cosines, scores, names, settings)
    assert (np.diff(result.values) >= 0).all()
    # The half that the curve was fitted on is one of the choices of four queries.
    candidates = [
        (cosines[list(rows)].ravel(), scores[list(rows)].ravel())
        for rows in combinations(range(8), 4)
        if set(result.similarities) <= set(cosines[list(rows)].ravel())
    ]
    assert candidates
    assert any(np.allclose(result.estimate(np.sort(x)).values, _least_rising(x, y), rtol=1e-12) for x, y in candidates)


@pytest.mark.parametrize("count", [3, 9, 19, 20, 40])
def test_with_one_value_a_group_it_is_split_conformal_prediction(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    for level in (0.5, 0.9, 0.95):
        place = math.ceil(level * (count + 1) - 1e-9)
        expected = np.sort(values)[place - 1] if place <= count else np.inf
        assert group_quantile(values, np.arange(count), level) == expected


def test_groups_have_one_weight_however_large() -> None:
    # One group of a thousand small values and nine single large ones: the large group is a tenth of the mass.
    values = np.concatenate([np.zeros(1000), np.arange(1.0, 10.0)])
    groups = np.concatenate([np.zeros(1000, int), np.arange(1, 10)])
    assert group_quantile(values, groups, 1 / 11) == 0.0
    assert group_quantile(values, groups, 0.5) == 5.0  # 1/11 of zeros, then 1/11 each: 6/11 at 5
    assert group_quantile(values, groups, 10 / 11) == 9.0
    assert group_quantile(values, groups, 0.95) == np.inf
    assert group_quantile(np.empty(0), np.empty(0, int), 0.5) == np.inf


TRIALS = 400


def test_intervals_cover_new_queries() -> None:
    """One new query and one of its images for each of many calibrations: hits are independent with one probability.

    It is at least 0.9, and without ties at most 0.9 + 2/(K + 1) with K queries in the bin (20 here, for each tail).
    """
    settings = CalibrationSettings(shares=(0.5,))
    hits, tops, top_hits, queries = 0, 0, 0, 42
    for trial in range(TRIALS):
        cosines, scores, names = planted(trial, queries + 1)
        result = fit_calibration(cosines[:-1], scores[:-1], names[:-1], settings)
        assert len(result.edges) == 1
        estimates = result.estimate(cosines[-1])
        inside = (estimates.low <= scores[-1]) & (scores[-1] <= estimates.high)
        hits += int(inside[0])
        top = np.flatnonzero(result.bins(cosines[-1]) == 1)
        if len(top):
            tops += 1
            top_hits += int(inside[top[0]])
    for found_hits, trials in ((hits, TRIALS), (top_hits, tops)):
        lowest, highest = binom.ppf(0.001, trials, 0.9), binom.ppf(0.999, trials, 0.9 + 2 / 22)
        assert lowest <= found_hits <= highest


def test_quantiles_of_all_images_alike_would_not_cover() -> None:
    """Why queries are the groups: where a query's images err together, nine queries are nine values, not 180.

    The 160th of 180 is the eighth of nine, which the tenth is below in 8 of 10.
    """
    naive, proper, trials = 0, 0, 2000
    groups = np.repeat(np.arange(9), 20)
    for trial in range(trials):
        residuals = np.random.default_rng(trial).normal(size=10)
        images = residuals[groups]
        naive += int(residuals[9] <= group_quantile(images, np.arange(180), 0.88))
        proper += int(residuals[9] <= group_quantile(images, groups, 0.88))
    assert naive < binom.ppf(0.001, trials, 0.88) <= proper


def test_the_order_of_queries_and_images_does_not_matter() -> None:
    cosines, scores, names = planted(3, 80)
    cosines = np.round(cosines, 1)  # with ties
    expected = fit_calibration(cosines, scores, names)
    random = np.random.default_rng(0)
    order, columns = random.permutation(80), random.permutation(20)
    again = fit_calibration(cosines[order][:, columns], scores[order][:, columns], [names[index] for index in order])
    for name in ("similarities", "values", "edges", "low", "high"):
        np.testing.assert_array_equal(getattr(again, name), getattr(expected, name))
    assert again.queries == expected.queries
    other = fit_calibration(cosines, scores, names, CalibrationSettings(seed=1))
    assert other.values.tolist() != expected.values.tolist()


def test_bins_with_too_few_queries_are_joined() -> None:
    cosines, scores, names = planted(4, 80, 30)
    cosines[5:, :] = np.minimum(cosines[5:, :], 0.5)  # hardly a query has very similar images
    result = fit_calibration(cosines, scores, names)
    assert (result.edges <= 0.5).all()
    assert np.isfinite(result.low).all()
    assert np.isfinite(result.high).all()


def test_a_bin_that_the_other_half_hardly_fills_says_nothing() -> None:
    settings = CalibrationSettings(shares=())
    cosines, scores, names = planted(5, 38, 4)
    result = fit_calibration(cosines, scores, names, settings)
    assert np.isfinite(result.high).all()
    with pytest.raises(ValueError, match="Intervals of 90% need at least 38 held-out queries"):
        fit_calibration(cosines[1:], scores[1:], names[1:], settings)
    assert np.isinf(group_quantile(scores[:18, 0], np.arange(18), 0.95))


def test_assessed_on_other_queries() -> None:
    calibration = fit_calibration(*planted(6, 200))
    cosines, scores, names = planted(7, 300, first=200)
    result = evaluate_calibration(calibration, cosines, scores, names)
    estimates = calibration.estimate(cosines)
    assert result.rmse == pytest.approx(np.sqrt(((estimates.values - scores) ** 2).mean()))
    assert result.rmse < result.spread == pytest.approx(scores.std())
    assert 0.5 < result.spearman < 1
    assert abs(result.coverage - 0.9) < 5 * result.coverage_error
    assert len(result.coverage_by_bin) == len(calibration.low) > 1
    assert result.count == 300
    order = np.random.default_rng(0).permutation(300)
    again = evaluate_calibration(calibration, cosines[order], scores[order], [names[index] for index in order])
    assert again.rmse == pytest.approx(result.rmse, rel=1e-12)
    assert again.coverage == pytest.approx(result.coverage, rel=1e-12)
    exact = replace(calibration, low=calibration.low * 0, high=calibration.high * 0)
    perfect = evaluate_calibration(exact, cosines, exact.estimate(cosines).values, names)
    assert (perfect.rmse, perfect.spearman, perfect.coverage) == (0.0, pytest.approx(1.0), 1.0)
    flat = evaluate_calibration(exact, np.zeros((1, 3)), np.array([[1.0, 2.0, 3.0]]), ["other"])
    assert np.isnan(flat.spearman)
    assert (flat.undefined, result.undefined) == (1, 0)
    assert np.isnan(flat.coverage_error)
    assert np.isnan(flat.coverage_by_bin).sum() == len(calibration.low) - 1


def test_the_queries_of_the_calibration_are_refused() -> None:
    cosines, scores, names = planted(8, 60)
    calibration = fit_calibration(cosines, scores, names)
    with pytest.raises(ValueError, match="1 queries were used for the calibration, such as 'query 3'"):
        evaluate_calibration(calibration, cosines[2:4], scores[2:4], ["new", "query 3"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, s, n: (c[:, :-1], s, n), "must be"),
        (lambda c, s, n: (c, s, n[:-1]), "must be"),
        (lambda c, s, n: (np.where(c == c[4, 2], np.nan, c), s, n), "Query 'query 4' has a similarity that is not"),
        (lambda c, s, n: (c, np.where(s == s[4, 2], np.inf, s), n), "Query 'query 4' has a score that is not finite"),
        (lambda c, s, n: (c, s, [*n[:-1], n[0]]), "Query 'query 0' is given twice"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_calibration(*change(*planted(9, 50)))


def test_settings_are_checked() -> None:
    for wrong in ({"confidence": 1.0}, {"shares": (0.9, 0.5)}, {"shares": (0.0,)}):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            CalibrationSettings(**wrong)  # type: ignore[arg-type]
    assert CalibrationSettings(0.9).needed == 19
    assert CalibrationSettings(0.5).needed == 3


def teacher_set(count: int = 60) -> TeacherSet:
    random = np.random.default_rng(0)
    features = Features(
        random.normal(size=(30, 5)).astype(np.float32), random.normal(size=(count, 5)).astype(np.float32)
    )
    rows = np.stack([random.permutation(30)[:12] for _ in range(count)]).astype(np.int32)
    scores = -np.sort(-random.normal(size=(count, 12)), axis=1).astype(np.float32)
    names = tuple(f"q{index}" for index in range(count))
    images = tuple(f"i{index}" for index in range(30))
    return TeacherSet(images, images, names, names, rows, scores, {"x": features}, {"teacher": "AbU+", "seed": 0})


def test_a_calibration_comes_back_and_belongs_to_its_ranker_and_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, ranker = teacher_set(), Ranker(5, width=6, hidden=1, outputs=4)
    calibration = calibrate(teacher, ranker, ["x"])
    direct = fit_calibration(similarities(ranker, teacher.features["x"], teacher.rows), teacher.scores, teacher.queries)
    np.testing.assert_array_equal(calibration.values, direct.values)
    save_calibration(tmp_path, calibration, calibration_identity(ranker, ["x"], teacher.identity))
    for result in (
        load_calibration(tmp_path, ranker, ["x"]),
        load_calibration(tmp_path, ranker, ["x"], teacher.identity),
    ):
        assert isinstance(result, Calibration)
        assert (result.queries, result.settings) == (calibration.queries, calibration.settings)
        for name in ("similarities", "values", "edges", "low", "high"):
            np.testing.assert_array_equal(getattr(result, name), getattr(calibration, name))
    with pytest.raises(ArtifactMismatchError, match="is the calibration of another ranker"):
        load_calibration(tmp_path, Ranker(5, width=6, hidden=1, outputs=4), ["x"])
    with pytest.raises(ArtifactMismatchError, match="is the calibration of another features"):
        load_calibration(tmp_path, ranker, ["y"])
    with pytest.raises(
        ArtifactMismatchError, match=r"is the calibration of another teacher: on disk .*'seed': 0.*'seed': 1"
    ):
        load_calibration(tmp_path, ranker, ["x"], {**teacher.identity, "seed": 1})
    whole = (tmp_path / CURVE).read_bytes()
    (tmp_path / CURVE).write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(ValueError, match="does not match its manifest"):
        load_calibration(tmp_path, ranker, ["x"])
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json"):
        load_calibration(tmp_path / "none", ranker, ["x"])


def test_intervals_that_say_nothing_are_kept(tmp_path: Path) -> None:
    ranker = Ranker(5, width=6, hidden=1, outputs=4)
    calibration = fit_calibration(*planted(1, 60))
    endless = replace(calibration, high=np.full_like(calibration.high, np.inf))
    save_calibration(tmp_path, endless, calibration_identity(ranker, ["x"], {}))
    assert load_calibration(tmp_path, ranker, ["x"]).estimate(np.array([0.5])).high[0] == np.inf
