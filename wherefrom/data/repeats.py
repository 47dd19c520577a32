"""How often training sees each image: the column `repeats` of an image set, and the data weights that it means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.runtime.artifacts import identity_hash

REPEATS = "repeats"
_MOST = 2**31  # an image that is seen more often in each epoch is a mistake, and sums stay exact


def parse_repeats(ids: Iterable[str], cells: Iterable[str]) -> Float[NDArray[np.float64], " n"] | None:
    """Reads the column `repeats`: positive whole numbers; an empty cell is 1.

    Args:
        ids: The images' ids, for the message.
        cells: The column.

    Returns:
        The numbers; None where all are 1, which is what a set without the column has.

    Raises:
        ValueError: A cell is no positive whole number; the image is named.
    """
    numbers = []
    for name, cell in zip(ids, cells, strict=True):
        text = cell.strip() or "1"
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not (1 <= number < _MOST and number.is_integer()):
            raise ValueError(
                f"The column {REPEATS!r} of image {name!r} holds {cell[:40]!r}. It says how often training saw the "
                "image in each epoch: write a whole number from 1 on, leave the cell empty, or rename a column that "
                "means something else."
            )
        numbers.append(number)
    return None if all(number == 1 for number in numbers) else np.array(numbers, dtype=np.float64)


def weighted_fingerprint(fingerprint: str, weights: Sequence[float] | NDArray[np.float64] | None) -> str:
    """The fingerprint of a training set of which each image is seen so often; the plain one where all are seen once.

    Args:
        fingerprint: The fingerprint of what is seen.
        weights: How often each image is; None is once.
    """
    if weights is None:
        return fingerprint
    return identity_hash({"of": fingerprint, REPEATS: [int(weight) for weight in weights]})
