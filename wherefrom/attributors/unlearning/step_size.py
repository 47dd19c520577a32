"""Line search for the step size α that gives a wanted relative increase of the query's loss."""

from __future__ import annotations

import math
from collections.abc import Callable

_INCREASE_TOLERANCE = 0.01
_MAX_TRIALS = 80
_SMALLEST_ALPHA, _LARGEST_ALPHA = 1e-12, 1e30  # float32 ends at 3e38


def alpha_for_increase(apply: Callable[[float], float], target: float, guess: float) -> float:
    """The α > 0 at which apply(α) = target, to 1 % of the target; apply(0) = 0.

    Brackets the root by growing α, then takes secant (regula falsi) steps that stay at least 5 % inside the bracket.

    Args:
        apply: The relative loss increase at α.
        target: The increase wanted.
        guess: Starting point, such as the α for a linear loss. A value that is not positive or not finite is replaced
            by a very small one.

    Raises:
        ValueError: No α reaches the target.
    """

    def excess(alpha: float) -> float:
        value = apply(alpha) - target
        return math.inf if math.isnan(value) else value  # NaN losses: the step is too long

    low, high, value_low = 0.0, guess if _SMALLEST_ALPHA < guess < _LARGEST_ALPHA else _SMALLEST_ALPHA, -target
    value_high = excess(high)
    for _ in range(_MAX_TRIALS):
        if abs(value_high) <= _INCREASE_TOLERANCE * target:
            return high
        if value_high < 0:
            if high > _LARGEST_ALPHA:
                break
            low, value_low = high, value_high
            high *= 8 if value_high < -0.9 * target else 2
            value_high = excess(high)
            continue
        secant = low - value_low * (high - low) / (value_high - value_low)
        middle = min(max(secant, low + 0.05 * (high - low)), high - 0.05 * (high - low))
        value = excess(middle)
        if abs(value) <= _INCREASE_TOLERANCE * target:
            return middle
        if value < 0:
            low, value_low = middle, value
        else:
            high, value_high = middle, value
    raise ValueError(
        f"No step size raises the query's loss by {target:.1%} (tried up to {high:.3g}). Ask for a smaller "
        "relative_loss_increase, or give alpha instead."
    )
