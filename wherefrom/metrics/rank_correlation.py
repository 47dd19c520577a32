"""How far methods agree: rank correlations of their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import spearmanr


def correlations(
    scores: Mapping[str, Sequence[Float[NDArray[np.float64], " n"]]],
) -> tuple[Float[NDArray[np.float64], "m m"], Float[NDArray[np.float64], "m m"]]:
    """Spearman correlation of every two methods' scores, its mean and standard error over the queries.

    Not a number where a method scores all images alike; the standard error of a single query is not a number either.
    """
    names = list(scores)
    count = len(next(iter(scores.values())))
    result = np.ones((len(names), len(names), count))
    for i, first in enumerate(names):
        for j in range(i):
            for query in range(count):
                left, right = scores[first][query], scores[names[j]][query]
                constant = np.ptp(left) == 0 or np.ptp(right) == 0
                value = float("nan") if constant else float(spearmanr(left, right).statistic)
                result[i, j, query] = result[j, i, query] = value
    error = result.std(axis=2, ddof=1) / np.sqrt(count) if count > 1 else np.full(result.shape[:2], np.nan)
    return result.mean(axis=2), error
