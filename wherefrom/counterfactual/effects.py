"""Effects of removals: what leaving images out of training does to each query's loss and image.

The headline is the matched minus the mismatched effect, so that a method which names generally important images does
not win: what happens to a query whose own images were left out, minus what happens to it where only those of other
queries were. It assumes that leaving out another query's images does to a query what it does to any other; query
groups are therefore chosen to share few images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.counterfactual.query_panel import Measurement
from wherefrom.counterfactual.removal import Removal
from wherefrom.counterfactual.retraining import RetrainingJob

Measured = Mapping[RetrainingJob, Mapping[str, Measurement]]
KINDS = ("loss", "mse", "similarity")


@dataclass(frozen=True)
class Effect:
    """Effects of one method's removals on each query, in the order of the queries.

    Attributes:
        queries: The queries.
        matched: Mean effect where the query's own images were left out.
        mismatched: Mean effect where only those of other queries were. Where one group takes all queries there is no
            such retraining: then the mean effect, on the same models, on the queries that nothing was left out for; NaN
            without such queries.
    """

    queries: tuple[str, ...]
    matched: Float[NDArray[np.float64], " q"]
    mismatched: Float[NDArray[np.float64], " q"]

    @property
    def difference(self) -> Float[NDArray[np.float64], " q"]:
        """Matched − mismatched effect."""
        return self.matched - self.mismatched


def matched_and_mismatched(removals: Sequence[Removal], effects: Sequence[Mapping[str, float]]) -> Effect:
    """Matched and mismatched effects on each query that some removal is about.

    Args:
        removals: The removals of one method and K.
        effects: For each of them, query -> effect on what was measured (a loss, a deviation).

    Raises:
        ValueError: A query was not measured after a removal.
    """
    queries = tuple(sorted({query for removal in removals for query in removal.queries}))
    bystanders = sorted(set.intersection(*map(set, effects)) - set(queries)) if effects else []
    matched: list[float] = []
    mismatched: list[float] = []
    for query in queries:
        missing = [removal for removal, effect in zip(removals, effects, strict=True) if query not in effect]
        if missing:
            raise ValueError(f"Query {query!r} was not measured after a removal by {missing[0].method}.")
        pairs = [(query in removal.queries, effect) for removal, effect in zip(removals, effects, strict=True)]
        matched.append(float(np.mean([effect[query] for mine, effect in pairs if mine])))
        others = [effect[query] for mine, effect in pairs if not mine]
        others = others or [effect[bystander] for _, effect in pairs for bystander in bystanders]
        mismatched.append(float(np.mean(others)) if others else float("nan"))
    return Effect(queries, np.array(matched), np.array(mismatched))


def measured_effects(
    before: Mapping[str, Measurement], after: Mapping[str, Measurement]
) -> dict[str, dict[str, float]]:
    """Query -> kind -> effect, between two models of one seed; images are compared with the query itself."""
    return {
        query: {"loss": result.loss - before[query].loss, "mse": result.mse, "similarity": result.similarity}
        for query, result in after.items()
    }


def removal_effects(removals: Sequence[Removal], measured: Measured, seeds: Sequence[int]) -> dict[str, Effect]:
    """Matched and mismatched effects on loss, image and similarity, each the mean over the seeds.

    Args:
        removals: The removals of one method and K.
        measured: The measurements of every query on each model.
        seeds: Seeds of the trainings.

    Raises:
        ValueError: A query was not measured after a removal.
    """
    result: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for removal in removals:
        by_seed = [
            measured_effects(measured[RetrainingJob((), seed)], measured[RetrainingJob(removal.ids, seed)])
            for seed in seeds
        ]
        for kind, each in result.items():
            each.append({query: float(np.mean([effect[query][kind] for effect in by_seed])) for query in by_seed[0]})
    return {kind: matched_and_mismatched(removals, each) for kind, each in result.items()}
