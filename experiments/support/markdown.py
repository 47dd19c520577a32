"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from wherefrom.metrics.standard_error import estimate


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of these titles and rows.

    Raises:
        ValueError: A row has another number of cells than there are titles.
    """
    lines = [titles, *rows]
    for row in lines:
        if len(row) != len(titles):
            raise ValueError(f"A row has {len(row)} cells, and there are {len(titles)} titles: {list(row)}.")
    head, *body = (f"| {' | '.join(row)} |" for row in lines)
    return "\n".join([head, "|---" * len(titles) + "|", *body])


def mean_and_error(values: ArrayLike) -> str:
    """The mean of one value a query, and its standard error."""
    return "{:.3f} ± {:.3f}".format(*estimate(np.asarray(values, dtype=np.float64)))
