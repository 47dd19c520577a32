"""Calibration of a ranker: similarities to estimates of the teacher's score, with conformal prediction intervals.

The estimate is an isotonic regression of the teacher's scores on similarity, fitted on one half of the held-out
queries. The interval is split-conformal: quantiles of the residuals on the other half, in bins of similarity. Images
of one query are not independent, so quantiles are taken over queries as groups: *hierarchical conformal prediction*
(Lee, Barber and Willett, "Distribution-free inference with hierarchical data", arXiv 2306.06342). Each of K
queries has weight 1/(K + 1), shared by its images in the bin, and the rest lies at infinity. For a new query that
is exchangeable with these, and an image drawn evenly from its images in a bin, the interval then holds the teacher's
score with at least the stated probability, whatever the distribution and however wrong the estimate.

The guarantee covers images selected as the held-out ones were: a calibration on the nearest 10,000 covers such images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.optimize import isotonic_regression

from wherefrom.distillation.embedding_similarity import similarities
from wherefrom.distillation.ranker import Ranker, load_ranker
from wherefrom.distillation.teacher_set import TeacherSet, read_teacher_set
from wherefrom.metrics.rank_correlation import spearman
from wherefrom.metrics.standard_error import estimate
from wherefrom.rankings.estimates import Estimates
from wherefrom.runtime.artifacts import (
    ArtifactMismatchError,
    Identity,
    canonical_json,
    hash_file,
    read_manifest,
    replacing,
    write_manifest,
)
from wherefrom.runtime.keyed_random import hash_text

CURVE = "calibration.safetensors"


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of a calibration.

    Attributes:
        confidence: Probability with which an interval contains the teacher's score.
        shares: Lower edges of the similarity bins, as quantiles; finer where images are retrieved.
        seed: Seed of the split of queries into those for the curve and those for the intervals.
    """

    confidence: float = 0.9
    shares: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95, 0.99)
    seed: int = 0

    def __post_init__(self) -> None:
        inside = all(0 < share < 1 for share in (*self.shares, self.confidence))
        if not inside or list(self.shares) != sorted(set(self.shares)):
            raise ValueError(
                "The confidence and the bins' shares must lie between 0 and 1, and the shares must rise; given "
                f"{self.confidence} and {list(self.shares)}."
            )

    @property
    def needed(self) -> int:
        """Minimum number of queries with images in a bin; with fewer, its interval is unbounded."""
        tail = (1 - self.confidence) / 2
        return math.ceil((1 - tail) / tail - 1e-9)


@dataclass(frozen=True)
class Calibration:
    """Increasing curve from similarity to influence, with residual quantiles by bin of similarity.

    Attributes:
        similarities: Knots of the curve, ascending.
        values: The curve at the knots; linear in between, constant outside.
        edges: Lower edges of the second bin and those after it.
        low: Lower quantile of the residuals in each bin.
        high: Upper quantile of the residuals in each bin.
        queries: All queries that it was fitted on.
        settings: Settings of the fit.
    """

    similarities: Float[NDArray[np.float64], " p"]
    values: Float[NDArray[np.float64], " p"]
    edges: Float[NDArray[np.float64], " b-1"]
    low: Float[NDArray[np.float64], " b"]
    high: Float[NDArray[np.float64], " b"]
    queries: tuple[str, ...]
    settings: CalibrationSettings

    def bins(self, cosines: Float[NDArray[np.floating], "..."]) -> Int64[NDArray[np.int64], "..."]:
        """Assigns each similarity to its bin, 0 the least similar."""
        bins: NDArray[np.int64] = np.searchsorted(self.edges, cosines, side="right")
        return bins

    def estimate(self, cosines: Float[NDArray[np.floating], "..."]) -> Estimates:
        """Estimates the teacher's scores of images with these similarities to a query."""
        values = np.interp(cosines, self.similarities, self.values)
        bins = self.bins(cosines)
        return Estimates(values, values + self.low[bins], values + self.high[bins])


def group_quantile(
    values: Float[NDArray[np.float64], " n"], groups: Int64[NDArray[np.int64], " n"], level: float
) -> float:
    """Computes the quantile over groups of equal weight, one of them at infinity.

    With one value per group it is split-conformal prediction's ⌈level · (K + 1)⌉-th smallest value.
    """
    _, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(values, kind="stable")
    below = np.cumsum(1.0 / ((len(counts) + 1) * counts[place[order]]))
    reached = np.flatnonzero(below >= level - 1e-9)
    return float(values[order[reached[0]]]) if len(reached) else float("inf")


def fit_calibration(
    cosines: Float[NDArray[np.floating], "q m"],
    scores: Float[NDArray[np.floating], "q m"],
    queries: Sequence[str],
    settings: CalibrationSettings = CalibrationSettings(),
) -> Calibration:
    """Fits the curve and the intervals on queries that the ranker was not trained on, in any order.

    Raises:
        ValueError: Shapes do not fit, a number is not finite, a query is named twice, or there are too few queries.
    """
    cosines, scores = _checked(cosines, scores, queries)
    if len(queries) // 2 < settings.needed:
        raise ValueError(
            f"Intervals of {settings.confidence:.0%} need at least {2 * settings.needed} held-out queries, half of "
            f"them for the curve; given {len(queries)}."
        )
    order = sorted(range(len(queries)), key=lambda row: (hash_text(f"{settings.seed}/{queries[row]}"), queries[row]))
    curve, rest = order[: len(order) // 2], order[len(order) // 2 :]
    corners, values = _isotonic(cosines[curve].ravel(), scores[curve].ravel())
    edges = _edges(cosines[curve], settings)
    count = len(edges) + 1
    residuals = scores[rest] - np.interp(cosines[rest], corners, values)
    bins = np.searchsorted(edges, cosines[rest], side="right")
    rows = np.broadcast_to(np.arange(len(rest))[:, None], bins.shape)
    level = (1 + settings.confidence) / 2
    low, high = np.empty(count), np.empty(count)
    for index in range(count):
        inside = bins == index
        low[index] = -group_quantile(-residuals[inside], rows[inside], level)
        high[index] = group_quantile(residuals[inside], rows[inside], level)
    return Calibration(corners, values, edges, low, high, tuple(sorted(queries)), settings)


def _checked(
    cosines: NDArray[np.floating], scores: NDArray[np.floating], queries: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if cosines.shape != scores.shape or cosines.ndim != 2 or len(cosines) != len(queries) or cosines.size == 0:
        raise ValueError(
            f"Similarities {cosines.shape} and scores {scores.shape} must be (queries, images) of the "
            f"{len(queries)} queries."
        )
    for what, values in (("similarity", cosines), ("score", scores)):
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise ValueError(f"Query {queries[bad[0]]!r} has a {what} that is not finite.")
    if len(set(queries)) < len(queries):
        twice = next(name for name in queries if list(queries).count(name) > 1)
        raise ValueError(f"Query {twice!r} is given twice.")
    return np.asarray(cosines, np.float64), np.asarray(scores, np.float64)


def _isotonic(
    x: Float[NDArray[np.float64], " n"], y: Float[NDArray[np.float64], " n"]
) -> tuple[Float[NDArray[np.float64], " p"], Float[NDArray[np.float64], " p"]]:
    """Isotonic regression: returns the ends of the steps of the fitted function."""
    order = np.lexsort((y, x))  # by both, so that sums do not depend on the order of the queries
    levels, first, counts = np.unique(x[order], return_index=True, return_counts=True)
    fitted = isotonic_regression(np.add.reduceat(y[order], first) / counts, weights=counts)
    ends = np.unique(np.concatenate([fitted.blocks[:-1], fitted.blocks[1:] - 1]))
    return levels[ends], fitted.x[ends]


def _edges(cosines: Float[NDArray[np.float64], "q m"], settings: CalibrationSettings) -> NDArray[np.float64]:
    """Computes the bin edges, merging bins in which too few queries have images."""
    edges = [float(edge) for edge in np.unique(np.quantile(cosines, settings.shares))]
    highest, lowest = cosines.max(axis=1), cosines.min(axis=1)
    while edges and int((highest >= edges[-1]).sum()) < settings.needed:
        edges.pop()
    while edges and int((lowest < edges[0]).sum()) < settings.needed:
        edges.pop(0)
    return np.array(edges)


def calibration_identity(ranker: Ranker, features: Sequence[str], teacher: Identity) -> dict[str, Any]:
    """Identity of a calibration: ranker, features and teacher."""
    return {"ranker": ranker.identity(), "features": list(features), "teacher": dict(teacher)}


def calibrate(
    teacher: TeacherSet,
    ranker: Ranker,
    features: Sequence[str],
    settings: CalibrationSettings = CalibrationSettings(),
) -> Calibration:
    """Fits a calibration on the queries of a teacher set that the ranker was not trained on.

    Raises:
        ValueError: The ranker takes other features, or there are too few queries.
    """
    cosines = similarities(ranker, teacher.concatenated(features), teacher.rows)
    return fit_calibration(cosines, teacher.scores, teacher.queries, settings)


def calibrate_ranker(
    folder: Path, ranker: Path, teacher: Path, settings: CalibrationSettings = CalibrationSettings()
) -> Calibration:
    """Calibrates a saved ranker on a teacher set of held-out queries, and saves the calibration.

    Args:
        folder: Output folder.
        ranker: Folder of the ranker.
        teacher: Folder of the teacher set.
        settings: Settings of the fit.

    Raises:
        ValueError: The ranker was trained on this teacher set (the intervals would be too narrow), it takes other
            features, or there are too few queries.
        FileNotFoundError: There is no ranker or no teacher set.
        StorageError: A file could not be written.
    """
    network, features = load_ranker(ranker)
    held_out = read_teacher_set(teacher, features)
    trained_on = read_manifest(ranker).get("training", {}).get("teacher")
    if trained_on is not None and trained_on == json.loads(canonical_json(held_out.identity)):
        raise ValueError(
            f"The ranker {ranker} was trained on the teacher set {teacher}: intervals calibrated on its own training "
            "queries would be too narrow. Curate others (captions.skip leaves out those that were used)."
        )
    calibration = calibrate(held_out, network, features, settings)
    save_calibration(folder, calibration, calibration_identity(network, features, held_out.identity))
    return calibration


def save_calibration(folder: Path, calibration: Calibration, identity: Identity) -> None:
    """Writes `calibration.safetensors` and `manifest.json`; see `calibration_identity`.

    Raises:
        StorageError: A file could not be written.
    """
    names = ("similarities", "values", "edges", "low", "high")
    with replacing(folder / CURVE) as temporary:
        save_file({name: np.ascontiguousarray(getattr(calibration, name)) for name in names}, temporary)
    curve = hash_file(folder / CURVE)
    write_manifest(
        folder, identity, settings=asdict(calibration.settings), queries=list(calibration.queries), curve=curve
    )


def load_calibration(
    folder: Path, ranker: Ranker, features: Sequence[str], teacher: Identity | None = None
) -> Calibration:
    """Loads the calibration of a ranker.

    Args:
        folder: Folder of the calibration.
        ranker: The ranker whose similarities it converts to estimates.
        features: Names of the features that the ranker takes.
        teacher: Required identity of the teacher set; None accepts any.

    Raises:
        ArtifactMismatchError: It belongs to another ranker or teacher.
        ValueError: It is damaged.
        FileNotFoundError: The folder holds no calibration.
    """
    manifest = read_manifest(folder)
    stored: Mapping[str, Any] = manifest["identity"]
    asked = calibration_identity(ranker, features, stored.get("teacher", {}) if teacher is None else teacher)
    wanted: Mapping[str, Any] = json.loads(canonical_json(asked))
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise ArtifactMismatchError(
                f"{folder} is the calibration of another {key}: on disk {stored.get(key)!r}, given {value!r}. "
                "Calibrate this one on held-out queries."
            )
    try:
        if hash_file(folder / CURVE) != manifest["curve"]:
            raise ValueError("it does not match its manifest")
        settings = {**manifest["settings"], "shares": tuple(manifest["settings"]["shares"])}
        return Calibration(
            **load_file(folder / CURVE),
            queries=tuple(manifest["queries"]),
            settings=CalibrationSettings(**settings),
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder / CURVE} cannot be used: {error}. Calibrate again.") from error


@dataclass(frozen=True)
class CalibrationMetrics:
    """Accuracy and coverage of a calibration on held-out queries.

    Attributes:
        rmse: Root mean squared error over all images, in the teacher's unit.
        spread: Standard deviation of the scores: the error of always predicting their mean.
        spearman: Mean over queries of the rank correlation of estimates and scores; those where either are constant
            have none and are left out. NaN where that is all.
        spearman_error: Its standard error.
        coverage: Mean over queries of the share of scores inside their intervals.
        coverage_error: Its standard error.
        coverage_by_bin: Coverage in each bin of similarity, the least similar first; NaN for empty bins.
        count: Number of queries.
        undefined: Queries without a rank correlation.
    """

    rmse: float
    spread: float
    spearman: float
    spearman_error: float
    coverage: float
    coverage_error: float
    coverage_by_bin: tuple[float, ...]
    count: int
    undefined: int = 0


def evaluate_calibration(
    calibration: Calibration,
    cosines: Float[NDArray[np.floating], "q m"],
    scores: Float[NDArray[np.floating], "q m"],
    queries: Sequence[str],
) -> CalibrationMetrics:
    """Measures accuracy and coverage on queries that neither the ranker nor the calibration has seen.

    Raises:
        ValueError: A query was used for the calibration, shapes do not fit, or a number is not finite.
    """
    cosines, scores = _checked(cosines, scores, queries)
    used = sorted(set(queries) & set(calibration.queries))
    if used:
        raise ValueError(
            f"{len(used)} queries were used for the calibration, such as {used[0]!r}: evaluate it on others."
        )
    estimates = calibration.estimate(cosines)
    inside = (estimates.low <= scores) & (scores <= estimates.high)
    bins = calibration.bins(cosines)
    correlations = np.array([spearman(a, b) for a, b in zip(estimates.values, scores, strict=True)])
    coverages = inside.mean(axis=1)
    by_bin = []
    for index in range(len(calibration.low)):
        here = bins == index
        some = here.any(axis=1)
        each = (inside & here).sum(axis=1)[some] / here.sum(axis=1)[some]
        by_bin.append(float(each.mean()) if len(each) else float("nan"))
    (mean, error), (coverage, coverage_error) = estimate(correlations), estimate(coverages)
    return CalibrationMetrics(
        rmse=float(np.sqrt(np.square(estimates.values - scores).mean())),
        spread=float(scores.std()),
        spearman=mean,
        spearman_error=error,
        coverage=coverage,
        coverage_error=coverage_error,
        coverage_by_bin=tuple(by_bin),
        count=len(queries),
        undefined=int(np.isnan(correlations).sum()),
    )
