"""Greedy removal: the K images go in rounds, and each round asks the model that was trained without the last ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.counterfactual.effects import Measured, by_method, effects, or_none
from wherefrom.counterfactual.reattribution import Reattribution
from wherefrom.counterfactual.removal import MOST_REMOVED, Removal, top_of_ranking
from wherefrom.counterfactual.retraining import Retrain
from wherefrom.counterfactual.sweep import Sweep
from wherefrom.metrics.standard_error import estimate

Rankings = Mapping[str, Mapping[str, Sequence[str]]]


@dataclass(frozen=True)
class Greedy:
    """What greedy removal does to each query beside taking away all K at once.

    Attributes:
        method: The method.
        k: How many of each query.
        rounds: In how many rounds.
        queries: The queries.
        greedy: ΔL without what was taken away in rounds.
        at_once: ΔL without the top K of the first ranking.
        removed: Mean number of images that a model was trained without, in rounds and at once.
        removals: What was taken away in rounds, by pool.
    """

    method: str
    k: int
    rounds: int
    queries: tuple[str, ...]
    greedy: Float[NDArray[np.float64], " q"]
    at_once: Float[NDArray[np.float64], " q"]
    removed: tuple[float, float]
    removals: list[Removal]

    @property
    def difference(self) -> Float[NDArray[np.float64], " q"]:
        """In rounds minus at once."""
        return self.greedy - self.at_once

    def as_json(self) -> dict[str, Any]:
        """Each query's numbers, and their means and standard errors."""
        numbers = {"greedy": self.greedy, "at_once": self.at_once, "difference": self.difference}
        return {
            "method": self.method,
            "k": self.k,
            "rounds": self.rounds,
            "queries": list(self.queries),
            "removed": list(self.removed),
            "pools": [{"queries": list(each.queries), "ids": list(each.ids)} for each in self.removals],
            **{name: or_none(values) for name, values in numbers.items()},
            "estimates": {name: or_none(estimate(values)) for name, values in numbers.items()},
        }


def check_greedy(at_once: Sequence[Removal], training: int) -> None:
    """Refuses what could take away too much: rounds may find images that queries of a pool share less than at once.

    Args:
        at_once: The ordinary removals, of methods that ask a model.
        training: Number of training images.

    Raises:
        ValueError: A pool of several queries could leave out more than a tenth of the training set.
    """
    for removal in at_once:
        most = removal.k * len(removal.queries)
        if len(removal.queries) > 1 and most > MOST_REMOVED * training:
            raise ValueError(
                f"Greedy removal could leave out {most} of {training} images for a pool of {len(removal.queries)} "
                f"queries and K {removal.k}, more than {MOST_REMOVED:.0%}: choose a smaller pool or K."
            )


def greedy_plan(at_once: Sequence[Removal], rounds: int, seeds: int, unmoved: Sequence[str]) -> str:
    """How many models greedy removal will ask for: those of the last round for every seed, the others for one.

    Args:
        at_once: The ordinary removals, of methods that ask a model.
        rounds: How many rounds.
        seeds: How many seeds.
        unmoved: Methods that ask no model.
    """
    pools = len(at_once)
    without = f"; not for {', '.join(unmoved)}: what asks no model ranks what is left as before" if unmoved else ""
    return (
        f"after these, greedy removal in {rounds} rounds: up to {pools * (rounds - 1 + seeds)} further models, "
        f"{pools} for each round and for each seed of the last{without}"
    )


def remove_greedily(
    rankings: Rankings,
    *,
    at_once: Sequence[Removal],
    rounds: int,
    measured: Measured,
    sweep: Sweep,
    again: Reattribution,
    seeds: Sequence[int],
) -> list[Greedy]:
    """Takes the images away in rounds, all pools of one round together, and compares with taking all at once.

    Each round takes K / rounds of what is left from the ranking of every query. Between the rounds only the first
    seed's models are asked.

    Args:
        rankings: Method -> query -> ids, the most influential first, under the model with all images.
        at_once: The ordinary removals, of methods that ask a model; their K is a multiple of the rounds.
        rounds: How many rounds.
        measured: What the models with all images and without the ordinary removals say.
        sweep: Trains the models and measures the queries on them.
        again: Attributes under retrained models.
        seeds: Seeds of the trainings.

    Raises:
        ValueError: Training or attribution failed, or too few images are left; what is finished is kept.
        StorageError: A file could not be written.
    """
    removals = [replace(each, ids=()) for each in at_once]
    result: Measured = {}
    for number in range(1, rounds + 1):
        if number > 1:
            sweep.log(f"greedy removal: ranking what is left after round {number - 1} of {rounds}")
        removals = [_next(each, each.k // rounds, rankings, again, seeds[0]) for each in removals]
        trained = list(seeds) if number == rounds else [seeds[0]]
        sweep.log(f"greedy removal, round {number} of {rounds}: {len(removals)} pools, {len(trained)} seeds")
        result = sweep.measure([Retrain(each.ids, seed) for seed in trained for each in removals])
    results = []
    for mine, theirs in zip(by_method(removals), by_method(at_once), strict=True):
        greedy, ordinary = (effects(each, {**measured, **result}, seeds)["loss"] for each in (mine, theirs))
        counts = [float(np.mean([len(removal.ids) for removal in each])) for each in (mine, theirs)]
        results.append(
            Greedy(
                mine[0].method,
                mine[0].k,
                rounds,
                greedy.queries,
                greedy.own,
                ordinary.own,
                (counts[0], counts[1]),
                mine,
            )
        )
    return results


def _next(removal: Removal, step: int, rankings: Rankings, again: Reattribution, seed: int) -> Removal:
    """The removal with so many more images of each of its queries."""
    if removal.ids:
        left: Mapping[str, Sequence[str]] = again(removal.method, Retrain(removal.ids, seed), removal.queries)
    else:
        left = rankings[removal.method]
    taken = {name for query in removal.queries for name in top_of_ranking(left[query], step, query)}
    return replace(removal, ids=tuple(sorted({*removal.ids, *taken})))
