"""Table of effects: one row for each method and K, as Markdown and as `counterfactual.json` keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.counterfactual.effects import KINDS, Effect
from wherefrom.counterfactual.results_file import or_nan, or_none
from wherefrom.metrics.standard_error import estimate
from wherefrom.runtime.measured_cost import Cost

NO_COSTS: Mapping[str, Cost] = {}


@dataclass(frozen=True)
class CounterfactualRow:
    """Effects of one method's removals at one K.

    Attributes:
        method: The method whose images were removed; `random`, or `seed-variance baseline`.
        k: How many of each query; 0 for the baseline.
        removed: Mean number of images that a retraining left out.
        loss: Increase of each query's loss.
        mse: Change of its image: mean squared error, pixels from 0 to 1.
        similarity: Cosine similarity of its image before and after.
        random_equivalent: How many random images must go for the same mean increase of the loss, and a 95 % interval;
            None without a random-removal curve.
    """

    method: str
    k: int
    removed: float
    loss: Effect
    mse: Effect
    similarity: Effect
    random_equivalent: tuple[float, float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """The row as JSON has it: null for NaN, and for infinity, which is beyond the random-removal curve's end."""
        kinds: dict[str, Effect] = {kind: getattr(self, kind) for kind in KINDS}
        return {
            "method": self.method,
            "k": self.k,
            "removed": self.removed,
            "random_equivalent": None if self.random_equivalent is None else or_none(self.random_equivalent),
            "queries": list(self.loss.queries),
            **{
                kind: {"matched": or_none(each.matched), "mismatched": or_none(each.mismatched)}
                for kind, each in kinds.items()
            },
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> CounterfactualRow:
        """The row that `as_json` described.

        Args:
            stored: A row of `results_file.read_results`.
        """

        def effect(kind: str) -> Effect:
            matched, mismatched = (or_nan(stored[kind][name]) for name in ("matched", "mismatched"))
            return Effect(tuple(stored["queries"]), matched, mismatched)

        ends = stored["random_equivalent"]
        first, low, high = (float("inf") if each is None else each for each in ends or (0.0, 0.0, 0.0))
        return cls(
            method=stored["method"],
            k=stored["k"],
            removed=stored["removed"],
            loss=effect("loss"),
            mse=effect("mse"),
            similarity=effect("similarity"),
            random_equivalent=None if ends is None else (first, low, high),
        )


def as_table(rows: Sequence[CounterfactualRow], costs: Mapping[str, Cost] = NO_COSTS) -> str:
    """The table in Markdown: means over queries ± standard errors, and what each method took where that is known.

    Of the headline also the median, for the loss of a few queries may increase by ten times as much as the others'.

    Args:
        rows: The rows.
        costs: Method -> what its attributions took.
    """
    titles = ["method", "K", "removed", "n", "ΔL matched", "ΔL mismatched", "ΔL matched − mismatched", "its median"]
    titles += ["MSE matched", "similarity matched"]
    with_curve = any(row.random_equivalent is not None for row in rows)
    titles += ["same effect as so many random images"] * with_curve
    titles += ["seconds a query", "stored, MiB"] * bool(costs)
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row.method, str(row.k), f"{row.removed:.0f}", str(len(row.loss.queries))]
        difference = row.loss.difference
        cells += [_mean(row.loss.matched), _mean(row.loss.mismatched), _mean(difference), _median(difference)]
        cells += [_mean(row.mse.matched), _mean(row.similarity.matched)]
        if with_curve:
            ends = row.random_equivalent
            cells.append("–" if ends is None else "{:,.0f} ({:,.0f} to {:,.0f})".format(*ends))
        if costs:
            cost = costs.get(row.method)
            cells += ["–", "–"] if cost is None else [f"{cost.seconds:.3g}", f"{cost.stored / 2**20:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_error(estimated: Sequence[float | None]) -> str:
    """Mean ± standard error for a table, as far as there are any."""
    mean, error = estimated
    if mean is None:
        return "–"
    # What is the same for all queries, as the mismatched effect of one group of all, has no spread but for rounding.
    return f"{mean:.3g}" if error is None or error <= 1e-9 * abs(mean) else f"{mean:.3g} ± {error:.2g}"


def _mean(values: Float[NDArray[np.float64], " q"]) -> str:
    return with_error(or_none(estimate(values)))


def _median(values: Float[NDArray[np.float64], " q"]) -> str:
    known = values[np.isfinite(values)]
    return f"{np.median(known):.3g}" if len(known) else "–"
