"""Rank correlations between the scores of several methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import spearmanr


def correlations(
    scores: Mapping[str, Sequence[Float[NDArray[np.float64], " n"]]],
) -> tuple[Float[NDArray[np.float64], "m m"], Float[NDArray[np.float64], "m m"]]:
    """Computes pairwise Spearman correlations of methods: mean and standard error over the queries.

    NaN where a method gives all images the same score; the standard error of a single query is NaN too.
    """
    names = list(scores)
    count = len(next(iter(scores.values())))
    table = np.ones((len(names), len(names), count))
    for i, first in enumerate(names):
        for j in range(i):
            for query in range(count):
                left, right = scores[first][query], scores[names[j]][query]
                constant = np.ptp(left) == 0 or np.ptp(right) == 0
                value = float("nan") if constant else float(spearmanr(left, right).statistic)
                table[i, j, query] = table[j, i, query] = value
    error = table.std(axis=2, ddof=1) / np.sqrt(count) if count > 1 else np.full(table.shape[:2], np.nan)
    return table.mean(axis=2), error
