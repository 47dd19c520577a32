"""Null distribution of scores: p-values from images that the model was never trained on."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

_TAIL = 0.1  # share of the null to which the exponential tail is fitted


def p_values(
    scores: Float[NDArray[np.float64], " n"], null: Float[NDArray[np.float64], " m"]
) -> Float[NDArray[np.float64], " n"]:
    """Computes one-sided p-values (1 + #{null ≥ score}) / (1 + m): valid at any m, never below 1 / (1 + m).

    Raises:
        ValueError: The null is empty.
    """
    if len(null) == 0:
        raise ValueError("p-values need at least one image that was never trained on.")
    at_least = len(null) - np.searchsorted(np.sort(null), scores, side="left")
    return np.asarray((1.0 + at_least) / (1.0 + len(null)), dtype=np.float64)


def family_wise_p_value(scores: Float[NDArray[np.float64], " n"], null: Float[NDArray[np.float64], " m"]) -> float:
    """Approximates the family-wise p-value of the highest of n scores.

    The upper tail of the null is modelled as exponential above its 90th percentile (a generalised Pareto tail of index
    0), so the result can go below 1 / (1 + m); with n images, p = 1 - (1 - tail)ⁿ. Used only to decide whether the
    report states that no image stands out. A null without a tail (its upper tenth is all equal) has nothing to fit: a
    score above it has the tail 1 / (1 + m) of its p-value.

    Raises:
        ValueError: The null has fewer than ten images.
    """
    if len(null) < 10:
        raise ValueError(
            f"The tail of the null needs at least 10 images that were never trained on; there are {len(null)}."
        )
    threshold = float(np.quantile(null, 1.0 - _TAIL))
    scale = float(np.mean(null[null > threshold] - threshold)) if (null > threshold).any() else 0.0
    best = float(np.max(scores))
    if best <= threshold:
        return 1.0
    tail = _TAIL * float(np.exp(-(best - threshold) / scale)) if scale > 0 else 1.0 / (1.0 + len(null))
    return float(-np.expm1(len(scores) * np.log1p(-tail)))
