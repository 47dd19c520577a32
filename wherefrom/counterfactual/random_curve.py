"""Random-removal curve: the effect of leaving out more and more random images, to read other effects off it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from wherefrom.counterfactual.removal import RANDOM, Removal
from wherefrom.runtime.keyed_random import hash_text


def random_removal_curve(counts: Sequence[int], samples: int, training: Sequence[str]) -> list[Removal]:
    """Removals of so many random images each, about no query: the curve of `random_equivalent`.

    The removals of each sample are nested: a larger count leaves out what a smaller one does, and more.

    Args:
        counts: Images left out at each point.
        samples: Models at each point.
        training: Ids of the training set.

    Raises:
        ValueError: A count is not positive, or nothing would be left to train on.
    """
    odd = [count for count in counts if not 0 < count < len(training)]
    if odd:
        raise ValueError(
            f"A random-removal curve of {len(training)} images has points between 1 and one less; given {odd[0]}."
        )
    result = []
    for count in counts:
        for sample in range(samples):
            # The salt decides which images a model is trained without, so it never changes.
            order = sorted(training, key=lambda name: hash_text(f"random ladder/{sample}/{name}"))
            result.append(Removal(RANDOM, count, (), tuple(sorted(order[:count]))))
    return result


def random_equivalent(
    counts: Sequence[int],
    effects: Sequence[Sequence[float]],
    target: float,
    *,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How many random images must go for the same effect, and a 95 % interval (AbU, section 5.1).

    The mean effects along the curve are made monotone by isotonic regression and joined by straight lines, from no
    effect at no images; the interval is a bootstrap over each point's models. Beyond the curve's end the answer is
    infinite.

    Args:
        counts: Images left out at each point, rising.
        effects: Effects of the models at each point.
        target: The effect to match.
        bootstrap_samples: Bootstrap samples.
        seed: Their seed.

    Raises:
        ValueError: The counts do not rise from above 0, or a point has no model.
    """
    points = [np.asarray(point, dtype=np.float64) for point in effects]
    if len(counts) != len(points) or not counts or counts[0] <= 0 or np.any(np.diff(counts) <= 0):
        raise ValueError(f"The curve's counts must rise from above 0, one for each point; given {list(counts)}.")
    if any(len(point) == 0 for point in points):
        raise ValueError("A point of the random-removal curve has no model.")
    sizes = np.array([len(point) for point in points], dtype=np.float64)

    def solve(means: Float[NDArray[np.float64], " r"]) -> float:
        return _crossing(np.array([0, *counts], dtype=np.float64), np.array([0.0, *_isotonic(means, sizes)]), target)

    random = np.random.default_rng(seed)
    drawn = [
        solve(np.array([random.choice(point, len(point)).mean() for point in points])) for _ in range(bootstrap_samples)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975), method="closest_observation")
    return solve(np.array([point.mean() for point in points])), float(low), float(high)


def _isotonic(
    values: Float[NDArray[np.float64], " r"], weights: Float[NDArray[np.float64], " r"]
) -> Float[NDArray[np.float64], " r"]:
    fitted: Float[NDArray[np.float64], " r"] = isotonic_regression(np.maximum(values, 0.0), weights=weights).x
    return fitted


def _crossing(x: Float[NDArray[np.float64], " r"], y: Float[NDArray[np.float64], " r"], target: float) -> float:
    """Where the rising line first reaches the target."""
    if target <= 0:
        return 0.0
    above = np.flatnonzero(y >= target)
    if len(above) == 0:
        return float("inf")
    right = int(above[0])
    left = right - 1
    return float(x[left] + (target - y[left]) / (y[right] - y[left]) * (x[right] - x[left]))
