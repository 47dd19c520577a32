"""Counterfactual evaluation of attribution methods by leave-K-out retraining (AbU, section 5.1).

The model is trained again without the images that a method names. The better the method, the more the loss of the
generated image increases, and the less the retrained model can draw it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.counterfactual.additivity import HalvedRemovals, halve_removals, measure_additivity
from wherefrom.counterfactual.effect_table import NO_COSTS, CounterfactualRow
from wherefrom.counterfactual.effects import KINDS, Effect, Measured, measured_effects, removal_effects
from wherefrom.counterfactual.iterative_removal import (
    check_iterative_removal,
    describe_iterative_removal,
    remove_iteratively,
)
from wherefrom.counterfactual.protocol import Protocol
from wherefrom.counterfactual.random_curve import random_equivalent, random_removal_curve
from wherefrom.counterfactual.reattribution import Reattribution, whole_ranking
from wherefrom.counterfactual.removal import RANDOM, Removal, by_method
from wherefrom.counterfactual.removal_plan import plan_evaluation
from wherefrom.counterfactual.replacements import (
    covering,
    describe_reattribution,
    find_replacements,
    mean_replacement_prediction,
    write_shown,
)
from wherefrom.counterfactual.results_file import ALL_IMAGES, COUNTERFACTUAL, SEED_BASELINE
from wherefrom.counterfactual.retraining import RetrainingJob
from wherefrom.counterfactual.sweep import Sweep
from wherefrom.queries.types import Scores
from wherefrom.runtime.artifacts import write_json
from wherefrom.runtime.measured_cost import Cost


def evaluate_counterfactual(
    folder: Path,
    *,
    rankings: Mapping[str, Sequence[Scores]],
    sweep: Sweep,
    protocol: Protocol = Protocol(),
    reattribution: Reattribution | None = None,
    costs: Mapping[str, Cost] = NO_COSTS,
) -> list[CounterfactualRow]:
    """Retrains without the images that the methods name, and measures every query on every model.

    Finished models and measurements are found again, so an interrupted evaluation resumes. `counterfactual.json` is
    written once its models are measured, and again with what re-attribution and iterative removal add to it.

    Args:
        folder: Where `counterfactual.json` goes.
        rankings: Method -> scores of all queries, over all training images.
        sweep: Trains the models and measures the queries on them.
        protocol: What to leave out, and what to measure.
        reattribution: Attributes under retrained models; needed for `reattributed_queries` and
            `iterative_removal_rounds`.
        costs: Method -> what its attributions of these queries took.

    Returns:
        A row for each method and K, for as many random images, and the seed-variance baseline where there are several
        seeds: the absolute difference that another seed alone makes.

    Raises:
        ValueError: The plan cannot be carried out, or a training failed; what is finished is kept.
        StorageError: A file could not be written.
    """
    if reattribution is None and (protocol.reattributed_queries or protocol.iterative_removal_rounds):
        raise ValueError(
            "protocol.reattributed_queries and protocol.iterative_removal_rounds attribute again: give "
            "`reattribution`, or leave both at 0."
        )
    if not rankings:
        raise ValueError("A counterfactual evaluation needs the scores of at least one method; none was given.")
    planned = _plan(rankings, protocol, sweep, reattribution)
    if planned.reattributed:
        chosen = [removal for group in planned.reattributed for removal in group]
        sweep.log(describe_reattribution(chosen, costs, len(protocol.seeds) > 1))
    rounds = protocol.iterative_removal_rounds
    if rounds:
        check_iterative_removal(planned.iterative, len(sweep.models.ids))
        sweep.log(describe_iterative_removal(planned.iterative, rounds, len(protocol.seeds), planned.unmoved))
    measured = sweep.measure(planned.jobs(protocol.seeds))
    rows = [_row(group, measured, protocol.seeds) for group in by_method(planned.removals)]
    if planned.curve:
        rows = [_with_equivalent(row, planned.curve, measured, protocol.seeds) for row in rows]
    rows += _seed_baseline(measured, protocol.seeds)
    result = {
        **_facts(sweep, planned.removals, protocol),
        "rows": [row.as_json() for row in rows],
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "additivity": [measure_additivity(each, measured, protocol.seeds).as_json() for each in planned.halved],
    }
    write_json(folder / COUNTERFACTUAL, result)
    if reattribution is not None and planned.reattributed:
        result |= _reattributed(folder, planned, reattribution, protocol.seeds)
        write_json(folder / COUNTERFACTUAL, result)
    if reattribution is not None and rounds:
        collected = (
            remove_iteratively(
                planned.rankings,
                at_once=planned.iterative,
                rounds=rounds,
                measured=measured,
                sweep=sweep,
                reattribution=reattribution,
                seeds=protocol.seeds,
            )
            if planned.iterative
            else []
        )
        result |= {
            "iterative_removal": [each.as_json() for each in collected],
            "without_iterative_removal": planned.unmoved,
        }
        write_json(folder / COUNTERFACTUAL, result)
    return rows


@dataclass(frozen=True)
class _Plan:
    """Everything that an evaluation removes.

    Attributes:
        rankings: Method -> query -> ids, the most influential first.
        removals: The removals of all methods and K, and those at random.
        halved: Those of additivity.
        curve: Those of the random-removal curve.
        reattributed: By method and K, the removals after which queries are attributed again.
        iterative: The removals that are also made in rounds.
        unmoved: Methods that use no model, so that retraining leaves their ranking of the rest as it was.
    """

    rankings: Mapping[str, Mapping[str, Sequence[str]]]
    removals: list[Removal]
    halved: list[HalvedRemovals]
    curve: list[Removal]
    reattributed: list[list[Removal]]
    iterative: list[Removal]
    unmoved: list[str]

    def jobs(self, seeds: Sequence[int]) -> list[RetrainingJob]:
        """The models to train, one seed after the other: what is cut short then has the first for all methods."""
        halves = [removal for each in self.halved for removal in (*each.first, *each.second)]
        result = [RetrainingJob((), seed) for seed in seeds]
        for removals in (self.removals, halves, self.curve):
            result += [RetrainingJob(removal.ids, seed) for seed in seeds for removal in removals]
        return result


def _plan(
    rankings: Mapping[str, Sequence[Scores]], protocol: Protocol, sweep: Sweep, reattribution: Reattribution | None
) -> _Plan:
    ids = sweep.models.ids
    named = {
        method: {scores.query.id: whole_ranking(scores) for scores in results} for method, results in rankings.items()
    }
    removals = plan_evaluation(named, protocol, ids)
    groups = [group for group in by_method(removals) if group[0].method != RANDOM]
    moved = {method for method in named if reattribution is not None and reattribution.uses_model(method)}
    again = protocol.reattributed_queries
    return _Plan(
        rankings=named,
        removals=removals,
        halved=[halve_removals(group, named[group[0].method], ids) for group in groups]
        if protocol.additivity_groups
        else [],
        curve=random_removal_curve(protocol.random_removal_curve, protocol.random_removal_samples, ids),
        reattributed=[covering(group, again) for group in groups] if again else [],
        iterative=[removal for group in groups for removal in group if removal.method in moved],
        unmoved=[method for method in named if method not in moved],
    )


def _facts(sweep: Sweep, removals: Sequence[Removal], protocol: Protocol) -> dict[str, Any]:
    """Settings and models, for readers of `counterfactual.json`."""
    models = [_model(sweep, Removal(ALL_IMAGES, 0, (), ()), seed) for seed in protocol.seeds]
    return {
        "protocol": vars(protocol),
        "prompts": {query.id: query.prompt for query in sweep.panel.queries},
        "encoder": None if sweep.panel.encoder is None else type(sweep.panel.encoder).__name__,
        "training_images": len(sweep.models.ids),
        "models": models + [_model(sweep, removal, seed) for removal in removals for seed in protocol.seeds],
    }


def _model(sweep: Sweep, removal: Removal, seed: int) -> dict[str, Any]:
    """The model that was trained without a removal's images, whose name is that of its drawn images."""
    name = sweep.models.name(RetrainingJob(removal.ids, seed))
    return {"name": name, "seed": seed, "method": removal.method, "k": removal.k, "queries": list(removal.queries)}


def _reattributed(folder: Path, planned: _Plan, reattribution: Reattribution, seeds: Sequence[int]) -> dict[str, Any]:
    """Replacements of the removed images, as `counterfactual.json` keeps them; their images go beside it."""
    result = [
        find_replacements(
            planned.rankings[group[0].method],
            group,
            reattribution,
            seed=seeds[0],
            control=seeds[1] if len(seeds) > 1 else None,
        )
        for group in planned.reattributed
    ]
    shown = [name for each in result for one in each for name in (*one.before, *one.after)]
    return {
        "reattribution": [one.as_json() for each in result for one in each],
        "replacement_prediction": [mean_replacement_prediction(each) for each in result],
        "captions": write_shown(folder, reattribution.data.images, shown),
    }


def _row(removals: Sequence[Removal], measured: Measured, seeds: Sequence[int]) -> CounterfactualRow:
    result = removal_effects(removals, measured, seeds)
    count = float(np.mean([len(removal.ids) for removal in removals]))
    return CounterfactualRow(
        method=removals[0].method,
        k=removals[0].k,
        removed=count,
        loss=result["loss"],
        mse=result["mse"],
        similarity=result["similarity"],
    )


def _with_equivalent(
    row: CounterfactualRow, curve: Sequence[Removal], measured: Measured, seeds: Sequence[int]
) -> CounterfactualRow:
    """The row with its random equivalent: the effect on the same queries' losses along the random-removal curve."""
    points: dict[int, list[float]] = {}
    for removal in curve:
        for seed in seeds:
            effects = measured_effects(measured[RetrainingJob((), seed)], measured[RetrainingJob(removal.ids, seed)])
            mean = float(np.mean([effects[query]["loss"] for query in row.loss.queries]))
            points.setdefault(removal.k, []).append(mean)
    counts = sorted(points)
    result = random_equivalent(counts, [points[count] for count in counts], float(row.loss.matched.mean()))
    return replace(row, random_equivalent=result)


def _seed_baseline(measured: Measured, seeds: Sequence[int]) -> list[CounterfactualRow]:
    """Absolute difference that another seed alone makes, with no image left out."""
    if len(seeds) < 2:
        return []
    models = [measured[RetrainingJob((), seed)] for seed in seeds]
    queries = tuple(sorted(models[0]))
    result: dict[str, Float[NDArray[np.float64], " q"]] = {}
    for kind in KINDS:
        result[kind] = np.array(
            [
                np.mean([abs(measured_effects(models[0], other)[query][kind]) for other in models[1:]])
                for query in queries
            ]
        )
    nothing = np.full(len(queries), np.nan)
    loss, mse, similarity = (Effect(queries, result[kind], nothing) for kind in KINDS)
    return [CounterfactualRow(SEED_BASELINE, 0, 0.0, loss=loss, mse=mse, similarity=similarity)]
