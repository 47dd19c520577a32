"""Calibrated influence estimates with prediction intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray


@dataclass(frozen=True)
class Estimates:
    """Estimated influence of images, in the teacher's unit.

    Attributes:
        values: The estimates.
        low: Lower bounds of their intervals; minus infinity where too few queries had such similar images.
        high: Upper bounds.
    """

    values: Float[NDArray[np.float64], "..."]
    low: Float[NDArray[np.float64], "..."]
    high: Float[NDArray[np.float64], "..."]
