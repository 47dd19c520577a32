"""Rank correlations between the scores of several methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from scipy.stats import spearmanr

from wherefrom.metrics.standard_error import estimate
from wherefrom.metrics.ties import is_constant


def spearman(left: Float[NDArray[np.floating], " n"], right: Float[NDArray[np.floating], " n"]) -> float:
    """Computes the Spearman correlation; NaN where one side is constant as far as its precision can tell."""
    if is_constant(left) or is_constant(right):
        return float("nan")
    return float(spearmanr(left, right).statistic)


def correlations(
    scores: Mapping[str, Sequence[Float[NDArray[np.float64], " n"]]],
) -> tuple[Float[NDArray[np.float64], "m m"], Float[NDArray[np.float64], "m m"], Int64[NDArray[np.int64], "m m"]]:
    """Computes pairwise Spearman correlations of methods: mean, standard error, and number of queries with one.

    A query for which one of the two methods gives all images the same score has none, and is left out. NaN where there
    is no such query; the standard error of a single query is NaN too.
    """
    names = list(scores)
    count = len(next(iter(scores.values())))
    table = np.ones((len(names), len(names), count))
    for i, first in enumerate(names):
        for j in range(i):
            for query in range(count):
                value = spearman(scores[first][query], scores[names[j]][query])
                table[i, j, query] = table[j, i, query] = value
    pairs = np.array([[estimate(values) for values in row] for row in table])
    return pairs[..., 0], pairs[..., 1], np.isfinite(table).sum(axis=2)
