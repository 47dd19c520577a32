"""Concentration of a query's influence: top-k shares and the effective number of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray


@dataclass(frozen=True)
class Concentration:
    """Distribution of a query's positive influence over images.

    Attributes:
        shares: k -> share held by the k most influential images; NaN if no image has positive influence.
        effective: (Σw)² / Σw², the effective number of images (inverse participation ratio); 0 if no image has
            positive influence.
    """

    shares: Mapping[int, float]
    effective: float


def concentration(scores: Float[NDArray[np.floating], " n"], tops: Sequence[int] = (1, 10, 100)) -> Concentration:
    """Computes the concentration of the positive scores: a teacher's, or a calibration's estimates of them.

    Scores must be in the teacher's unit, where 0 is no influence; cosines are not.

    Raises:
        ValueError: A score is not finite, or a `k` not positive.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"Score {int(np.flatnonzero(~np.isfinite(scores))[0])} is not finite.")
    if not tops or min(tops) < 1:
        raise ValueError(f"The numbers of images must be positive; given {list(tops)}.")
    weights = -np.sort(-np.maximum(np.asarray(scores, dtype=np.float64), 0.0))
    total = weights.sum()
    if total == 0:
        return Concentration(dict.fromkeys(tops, float("nan")), 0.0)
    weights = weights / weights[0]  # the largest is 1, so that squares of tiny scores do not vanish
    held = weights.cumsum() / weights.sum()
    shares = {top: float(held[min(top, len(held)) - 1]) for top in tops}
    return Concentration(shares, float(weights.sum() ** 2 / np.square(weights).sum()))
