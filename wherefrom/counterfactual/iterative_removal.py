"""Iterative removal: the K images are removed in rounds, each ranked by the model trained without those before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.counterfactual.effects import Measured, removal_effects
from wherefrom.counterfactual.reattribution import Reattribution
from wherefrom.counterfactual.removal import MOST_REMOVED, Removal, by_method, top_of_ranking
from wherefrom.counterfactual.results_file import or_none
from wherefrom.counterfactual.retraining import RetrainingJob
from wherefrom.counterfactual.sweep import Sweep
from wherefrom.metrics.standard_error import estimate

Rankings = Mapping[str, Mapping[str, Sequence[str]]]


@dataclass(frozen=True)
class IterativeRemoval:
    """Effects of iterative removal on each query's loss, beside those of removing all K at once.

    Attributes:
        method: The method.
        k: How many of each query.
        rounds: In how many rounds.
        queries: The queries.
        iterative: ΔL without what was removed in rounds.
        at_once: ΔL without the top K of the first ranking.
        removed: Mean number of images that a model was trained without, in rounds and at once.
        removals: What was removed in rounds, by query group.
    """

    method: str
    k: int
    rounds: int
    queries: tuple[str, ...]
    iterative: Float[NDArray[np.float64], " q"]
    at_once: Float[NDArray[np.float64], " q"]
    removed: tuple[float, float]
    removals: list[Removal]

    @property
    def difference(self) -> Float[NDArray[np.float64], " q"]:
        """In rounds minus at once."""
        return self.iterative - self.at_once

    def as_json(self) -> dict[str, Any]:
        """Each query's numbers, and their means and standard errors."""
        numbers = {"iterative": self.iterative, "at_once": self.at_once, "difference": self.difference}
        return {
            "method": self.method,
            "k": self.k,
            "rounds": self.rounds,
            "queries": list(self.queries),
            "removed": list(self.removed),
            "query_groups": [{"queries": list(each.queries), "ids": list(each.ids)} for each in self.removals],
            **{name: or_none(values) for name, values in numbers.items()},
            "estimates": {name: or_none(estimate(values)) for name, values in numbers.items()},
        }


def check_iterative_removal(at_once: Sequence[Removal], training: int) -> None:
    """Refuses what could remove too much: rounds may find images that queries of a group share less than at once.

    Args:
        at_once: The ordinary removals, of methods that use a model.
        training: Number of training images.

    Raises:
        ValueError: A group of several queries could leave out more than a tenth of the training set.
    """
    for removal in at_once:
        most = removal.k * len(removal.queries)
        if len(removal.queries) > 1 and most > MOST_REMOVED * training:
            raise ValueError(
                f"Iterative removal could leave out {most} of {training} images for a group of {len(removal.queries)} "
                f"queries and K {removal.k}, more than {MOST_REMOVED:.0%}: choose a smaller query group or K."
            )


def describe_iterative_removal(at_once: Sequence[Removal], rounds: int, seeds: int, unmoved: Sequence[str]) -> str:
    """Line for the log: how many models are needed, those of the last round for every seed, the others for one.

    Args:
        at_once: The ordinary removals, of methods that use a model.
        rounds: How many rounds.
        seeds: How many seeds.
        unmoved: Methods that use no model.
    """
    groups = len(at_once)
    without = f"; not for {', '.join(unmoved)}: a method without a model ranks the rest as before" if unmoved else ""
    return (
        f"after these, iterative removal in {rounds} rounds: up to {groups * (rounds - 1 + seeds)} further models, "
        f"{groups} for each round and for each seed of the last{without}"
    )


def remove_iteratively(
    rankings: Rankings,
    *,
    at_once: Sequence[Removal],
    rounds: int,
    measured: Measured,
    sweep: Sweep,
    reattribution: Reattribution,
    seeds: Sequence[int],
) -> list[IterativeRemoval]:
    """Removes the images in rounds, all query groups of one round together, and compares with removing all at once.

    Each round removes the first K / rounds of what is left from the ranking of every query. Between the rounds only
    the first seed's models are used.

    Args:
        rankings: Method -> query -> ids, the most influential first, under the model with all images.
        at_once: The ordinary removals, of methods that use a model; their K is a multiple of the rounds.
        rounds: How many rounds.
        measured: Measurements on the models with all images and without the ordinary removals.
        sweep: Trains the models and measures the queries on them.
        reattribution: Attributes under retrained models.
        seeds: Seeds of the trainings.

    Raises:
        ValueError: Training or attribution failed, or too few images are left; what is finished is kept.
        StorageError: A file could not be written.
    """
    removals = [replace(each, ids=()) for each in at_once]
    result: Measured = {}
    for number in range(1, rounds + 1):
        if number > 1:
            sweep.log(f"iterative removal: ranking what is left after round {number - 1} of {rounds}")
        removals = [_next(each, each.k // rounds, rankings, reattribution, seeds[0]) for each in removals]
        trained = list(seeds) if number == rounds else [seeds[0]]
        sweep.log(f"iterative removal, round {number} of {rounds}: {len(removals)} query groups, {len(trained)} seeds")
        result = sweep.measure([RetrainingJob(each.ids, seed) for seed in trained for each in removals])
    results = []
    for mine, theirs in zip(by_method(removals), by_method(at_once), strict=True):
        iterative, ordinary = (removal_effects(each, {**measured, **result}, seeds)["loss"] for each in (mine, theirs))
        counts = [float(np.mean([len(removal.ids) for removal in each])) for each in (mine, theirs)]
        results.append(
            IterativeRemoval(
                method=mine[0].method,
                k=mine[0].k,
                rounds=rounds,
                queries=iterative.queries,
                iterative=iterative.matched,
                at_once=ordinary.matched,
                removed=(counts[0], counts[1]),
                removals=mine,
            )
        )
    return results


def _next(removal: Removal, step: int, rankings: Rankings, reattribution: Reattribution, seed: int) -> Removal:
    """The removal with so many more images of each of its queries."""
    if removal.ids:
        left: Mapping[str, Sequence[str]] = reattribution(
            removal.method, RetrainingJob(removal.ids, seed), removal.queries
        )
    else:
        left = rankings[removal.method]
    taken = {name for query in removal.queries for name in top_of_ranking(left[query], step, query)}
    return replace(removal, ids=tuple(sorted({*removal.ids, *taken})))
