"""Estimates of influence with intervals, as a calibration gives them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray


@dataclass(frozen=True)
class Estimates:
    """What is said of images' influence, in the teacher's unit.

    Attributes:
        values: The estimates.
        low: Lower ends of their intervals; minus infinity where too few queries had such similar images.
        high: Upper ends.
    """

    values: Float[NDArray[np.float64], "..."]
    low: Float[NDArray[np.float64], "..."]
    high: Float[NDArray[np.float64], "..."]
