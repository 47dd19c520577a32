"""What retraining changed: from the measurements of models to one number a query, its mean and standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.counterfactual.removal import Effect, Removal, effect_of
from wherefrom.counterfactual.retraining import Measurement, Retrain

Measured = Mapping[Retrain, Mapping[str, Measurement]]
KINDS = ("loss", "mse", "similarity")


def changes(before: Mapping[str, Measurement], after: Mapping[str, Measurement]) -> dict[str, dict[str, float]]:
    """Query -> what changed between two models of one seed; images are compared with the query itself."""
    return {
        query: {"loss": result.loss - before[query].loss, "mse": result.mse, "similarity": result.similarity}
        for query, result in after.items()
    }


def effects(removals: Sequence[Removal], measured: Measured, seeds: Sequence[int]) -> dict[str, Effect]:
    """Own and others' changes of loss, image and similarity, each the mean over the seeds.

    Args:
        removals: The removals of one method and K.
        measured: What each model says of each query.
        seeds: Seeds of the trainings.

    Raises:
        ValueError: A query was not measured after a removal.
    """
    result: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for removal in removals:
        by_seed = [changes(measured[Retrain((), seed)], measured[Retrain(removal.ids, seed)]) for seed in seeds]
        for kind, each in result.items():
            each.append({query: float(np.mean([change[query][kind] for change in by_seed])) for query in by_seed[0]})
    return {kind: effect_of(removals, each) for kind, each in result.items()}


def by_method(removals: Sequence[Removal]) -> list[list[Removal]]:
    """The removals of each method and K."""
    result: dict[tuple[str, int], list[Removal]] = {}
    for removal in removals:
        result.setdefault((removal.method, removal.k), []).append(removal)
    return list(result.values())


def or_none(values: Sequence[float] | Float[NDArray[np.float64], " q"]) -> list[float | None]:
    """Numbers as JSON has them: null where there is none."""
    return [float(value) if np.isfinite(value) else None for value in values]


def number(estimate: Sequence[float | None]) -> str:
    """Mean ± standard error, as far as there are any, for a table."""
    mean, error = estimate
    if mean is None:
        return "–"
    # What is the same for all queries, as the others of one pool that has them all, has no spread but for rounding.
    return f"{mean:.3g}" if error is None or error <= 1e-9 * abs(mean) else f"{mean:.3g} ± {error:.2g}"


def or_nan(values: Sequence[float | None]) -> Float[NDArray[np.float64], " q"]:
    """Numbers from JSON."""
    return np.array(values, dtype=np.float64)
