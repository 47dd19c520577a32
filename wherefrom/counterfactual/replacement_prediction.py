"""Replacement prediction: did a ranking predict which images take over once its first ones are removed?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ReplacementPrediction:
    """Agreement of the ranking before a removal with the one after it, on the images that are left.

    Attributes:
        spearman: Spearman correlation of the two; NaN where a single image is left.
        share: Share of the top K afterwards that the first ranking had in the K places directly below what was removed.
        chance: The share that a random order of what is left has on average.
    """

    spearman: float
    share: float
    chance: float


def evaluate_replacement_prediction(
    first: Sequence[str], removed: Collection[str], after: Sequence[str], k: int
) -> ReplacementPrediction:
    """Compares two rankings of one query.

    Args:
        first: Ids of all images, the most influential first.
        removed: Those that were left out.
        after: The ids that are left, the most influential first, under the model that was trained without the others.
        k: How many places count for the share; all that are left, where there are fewer.

    Raises:
        ValueError: `after` does not hold just what is left, an image occurs twice, nothing is left, or `k` is not
            positive.
    """
    gone = set(removed)
    left = [name for name in first if name not in gone]
    if k < 1 or not left:
        raise ValueError(
            f"Replacement prediction needs a positive K and an image that is left; given {k} and {len(left)}."
        )
    if sorted(left) != sorted(after) or len(set(left)) < len(left):
        raise ValueError(
            f"The ranking afterwards holds {len(after)} images, which are not just the {len(left)} of the first "
            "ranking that are left: it was made of other images."
        )
    places = {name: place for place, name in enumerate(after)}
    count, most = len(left), min(k, len(left))
    # No ties: Spearman's correlation is that of the places.
    squares = float(np.square(np.array([places[name] for name in left], dtype=np.float64) - np.arange(count)).sum())
    spearman = 1.0 - 6.0 * squares / (count * (count**2 - 1.0)) if count > 1 else float("nan")
    return ReplacementPrediction(spearman, len(set(left[:most]) & set(after[:most])) / most, most / count)
