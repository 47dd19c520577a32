"""Split-half reliability of scores that are averaged over noise samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from wherefrom.metrics.rank_correlation import spearman


def split_half(
    score: Callable[[Int64[NDArray[np.int64], " h"]], Float[NDArray[np.float64], " n"]],
    noise_samples: int,
    seed: int,
    splits: int = 10,
) -> float:
    """Estimates the reliability of scores averaged over noise samples, by Spearman-Brown from random halves.

    The Spearman correlation r between the scores of two halves, averaged over random splits, gives 2r / (1 + r) for
    all samples together (Brown 1910; Spearman 1910).

    Args:
        score: Computes the scores from some of the noise samples, given by index.
        noise_samples: Number of noise samples.
        seed: Seed of the splits.
        splits: Number of random splits.

    Returns:
        The reliability, between -1 and 1; NaN with fewer than two noise samples, and where the scores of a half are
        all equal.
    """
    if noise_samples < 2:
        return float("nan")
    random = np.random.default_rng(seed)
    correlations = []
    for _ in range(splits):
        order = random.permutation(noise_samples)
        halves = score(np.sort(order[: noise_samples // 2])), score(np.sort(order[noise_samples // 2 :]))
        correlations.append(spearman(*halves))
        if np.isnan(correlations[-1]):
            return float("nan")
    mean = float(np.mean(correlations))
    # The formula is unbounded towards r = -1; below 0 it only means that the halves contradict each other.
    return max(2 * mean / (1 + mean), -1.0) if mean > -1 else -1.0
