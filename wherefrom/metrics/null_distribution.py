"""The null: how high do images score that the model was never trained on?"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

_TAIL = 0.1  # share of the null whose excesses the tail is fitted to


def p_values(
    scores: Float[NDArray[np.float64], " n"], null: Float[NDArray[np.float64], " m"]
) -> Float[NDArray[np.float64], " n"]:
    """(1 + #{null ≥ score}) / (1 + m): one-sided, valid at any m, never below 1 / (1 + m).

    Raises:
        ValueError: The null is empty.
    """
    if len(null) == 0:
        raise ValueError("p-values need at least one image that was never trained on.")
    at_least = len(null) - np.searchsorted(np.sort(null), scores, side="left")
    return np.asarray((1.0 + at_least) / (1.0 + len(null)), dtype=np.float64)


def standing_out(scores: Float[NDArray[np.float64], " n"], null: Float[NDArray[np.float64], " m"]) -> float:
    """How surprising the highest score is among n images that were never trained on (a family-wise p-value).

    The null's upper tail is taken to be exponential above its 90th percentile (the Pareto-type tail of index 0), so
    that the answer can go below 1 / (1 + m); with n images, p = 1 - (1 - tail)ⁿ. An approximation: it decides
    whether the report says that nothing stands out, no more.

    Raises:
        ValueError: The null has fewer than ten images.
    """
    if len(null) < 10:
        raise ValueError(
            f"The tail of the null needs at least 10 images that were never trained on; there are {len(null)}."
        )
    threshold = float(np.quantile(null, 1.0 - _TAIL))
    excess = float(np.mean(null[null > threshold] - threshold)) if (null > threshold).any() else 0.0
    best = float(np.max(scores))
    if best <= threshold:
        return 1.0
    tail = _TAIL * float(np.exp(-(best - threshold) / excess)) if excess > 0 else 0.0
    return float(-np.expm1(len(scores) * np.log1p(-tail)))
