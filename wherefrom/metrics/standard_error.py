"""Mean and standard error of per-query values."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray


def estimate(values: Float[NDArray[np.float64], " q"]) -> tuple[float, float]:
    """Computes mean and standard error of the finite values; NaN where there are too few."""
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return float("nan"), float("nan")
    return float(known.mean()), float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")
