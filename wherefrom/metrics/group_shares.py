"""Shares of groups (authors, styles, licences) in a query's influence, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray

_FEWEST_RESAMPLES = 100
_BLOCK = 1 << 18  # images resampled at a time; bounds the memory, whatever the size of the training set


@dataclass(frozen=True)
class Share:
    """A group's share of a query's influence.

    Attributes:
        name: The group.
        share: Its share, 0 to 1.
        low: Lower end of the interval around the share.
        high: Upper end of the interval.
        expected: The group's share of the images in the training set (the chance level), if known.
    """

    name: str
    share: float
    low: float
    high: float
    expected: float | None


def _check(scores: NDArray[np.float64], groups: Sequence[str], top: int, resamples: int, confidence: float) -> None:
    if scores.ndim != 1 or len(scores) != len(groups) or not len(groups):
        raise ValueError(f"Group shares need one score and one group per image; got {scores.shape} and {len(groups)}.")
    if not np.isfinite(scores).all():
        where = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"The score at position {where} is {scores[where]}; group shares need finite scores.")
    if not 1 <= top <= len(scores):
        raise ValueError(f"top is {top}; it must be between 1 and the number of scored images, {len(scores)}.")
    if resamples < _FEWEST_RESAMPLES or not 0 < confidence < 1:
        raise ValueError(
            f"The confidence is {confidence} and the number of resamples {resamples}; the confidence must lie between "
            f"0 and 1, and there must be at least {_FEWEST_RESAMPLES} resamples."
        )


def _top_masses(
    ordered: Float[NDArray[np.float64], " n"], copies: Int64[NDArray[np.int64], "b n"], top: int
) -> Float[NDArray[np.float64], "b m"]:
    """Computes the influence mass in each of B multisets of the N images, for the first M ≤ N of them.

    Images that tie at the edge of the top share the remaining places evenly, so the input order does not matter. Images
    after the first M have no mass.

    Args:
        ordered: Scores in descending order.
        copies: Multiplicity of each image in each multiset.
        top: Number of images that count.
    """
    count = len(ordered)
    places = [(count - 1) // 2, count // 2, top - 1]
    levels = ordered[[np.searchsorted(reached, places, side="right") for reached in copies.cumsum(axis=1)]]
    median, edge = levels[:, :2].mean(axis=1, keepdims=True), levels[:, 2:]
    reach = np.searchsorted(-ordered, -edge.min(), side="right")
    ordered, copies = ordered[:reach], copies[:, :reach]
    above, tied = (ordered > edge) * copies, (ordered == edge) * copies
    left = (top - above.sum(axis=1, keepdims=True)) / tied.sum(axis=1, keepdims=True)
    masses: NDArray[np.float64] = (above + left * tied) * np.maximum(ordered - median, 0.0)
    return masses


def group_shares(
    scores: Float[NDArray[np.float64], " n"],
    *,
    groups: Sequence[str],
    top: int,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> list[Share]:
    """Computes the share of each group in the influence of the `top` highest scores.

    *Mass*: an image among the `top` highest scores has the mass max(score - median, 0), the median taken over all N
    images (the level of an image that has nothing to do with the query, as long as most have nothing to do with it);
    every other image has mass 0. Images that tie at the edge of the top share the remaining places evenly.

    *Share*: the group's mass over the mass of all groups. So the shares add up to 1, and are invariant to
    shifting all scores or multiplying them by a positive number. They divide the measured influence among the images
    ranked highest; they are not fractions of the generated image that the groups "made".

    *Interval*: percentile bootstrap. All N images are resampled with replacement, then median, top and shares are
    recomputed. It measures how far the share depends on which images happen to be in the training set; noise in the
    scores themselves is not included. A resample in which nothing exceeds the median has no shares and is left out.
    As with any percentile interval, the share itself need not lie inside, above all when `top` is very small.

    *Expected*: the group's share of the N images, whatever their scores.

    Args:
        scores: Score of each training image, higher = more influential; all of them, not only the highest.
        groups: The group of each image.
        top: Number of highest scores that count.
        seed: Seed of the resampling; the same seed gives the same intervals.
        resamples: Number of bootstrap resamples.
        confidence: Confidence level of the interval.

    Returns:
        Every group that occurs, by descending share; ties by descending `expected`, then by name.

    Raises:
        ValueError: Lengths that differ, a score that is not finite, `top`, `resamples` or `confidence` out of range, or
            no score above the median (all equal), so that there is nothing to divide.
    """
    scores = np.asarray(scores, dtype=np.float64)
    _check(scores, groups, top, resamples, confidence)
    names, group = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    # Groups are the second key, so that resampling does not depend on the order in which images were given.
    order = np.lexsort((group, -scores))
    ordered, group = scores[order], group[order]
    count = len(ordered)

    def divide(copies: NDArray[np.int64]) -> NDArray[np.float64]:
        each = _top_masses(ordered, copies, top)
        cells = np.arange(len(copies))[:, None] * len(names) + group[: each.shape[1]]
        masses = np.bincount(cells.ravel(), each.ravel(), len(copies) * len(names)).reshape(len(copies), len(names))
        totals = masses.sum(axis=1, keepdims=True)
        shares: NDArray[np.float64] = masses[totals[:, 0] > 0] / totals[totals > 0, None]
        return shares

    whole = divide(np.ones((1, count), dtype=np.int64))
    if not len(whole):
        raise ValueError(
            f"The top {top} scores all equal the median, {ordered[0]}: there is no influence to divide among groups. "
            "Leave the shares out for this query."
        )
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // count)
    seen, values = [], []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = generator.integers(count, size=(size, count)) + np.arange(size)[:, None] * count
        for row in divide(np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)):
            seen.append(np.flatnonzero(row))
            values.append(row[seen[-1]])
    # A data set may have a hundred thousand authors of whom few ever reach the top: only these get a column.
    columns, column = np.unique(np.concatenate(seen), return_inverse=True)
    table = np.zeros((len(seen), len(columns)))
    table[np.repeat(np.arange(len(seen)), [len(each) for each in seen]), column] = np.concatenate(values)
    low, high = np.zeros(len(names)), np.zeros(len(names))
    low[columns], high[columns] = np.quantile(table, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    expected = np.bincount(group, minlength=len(names)) / count
    shares = [
        Share(str(name), float(s), float(lo), float(hi), float(e))
        for name, s, lo, hi, e in zip(names, whole[0], low, high, expected, strict=True)
    ]
    return sorted(shares, key=lambda each: (-each.share, -(each.expected or 0.0), each.name))
