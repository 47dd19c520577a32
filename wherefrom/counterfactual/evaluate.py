"""The judge: retrain without the images that a method names, and see whether the generated image is gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.counterfactual.additivity import halve, synergy_of
from wherefrom.counterfactual.effects import KINDS, Measured, by_method, changes, effects, number, or_none
from wherefrom.counterfactual.iterative_removal import check_greedy, greedy_plan, remove_greedily
from wherefrom.counterfactual.protocol import Protocol
from wherefrom.counterfactual.reattribution import (
    Reattribution,
    after_plan,
    covering,
    foreseen,
    replacements,
    whole_ranking,
    write_shown,
)
from wherefrom.counterfactual.removal import (
    RANDOM,
    Effect,
    Removal,
    plan_removals,
    pool_queries,
    random_equivalent,
    random_ladder,
    random_removals,
    top_of_ranking,
)
from wherefrom.counterfactual.retraining import Retrain
from wherefrom.counterfactual.sweep import Sweep
from wherefrom.metrics.standard_error import estimate
from wherefrom.queries.types import Scores
from wherefrom.runtime.artifacts import write_json
from wherefrom.runtime.measured_cost import Cost

RESULT = "counterfactual.json"
IMAGES = "pictures"  # folder of what each model draws
FLOOR = "another seed"
NO_COSTS: Mapping[str, Cost] = {}


@dataclass(frozen=True)
class Row:
    """One line of the judge's table.

    Attributes:
        method: Whose images went; `random`, or `another seed` for the floor.
        k: How many of each query.
        removed: Mean number of images that went.
        loss: Change of each query's loss, own and others.
        mse: Change of its image, own and others.
        similarity: Similarity of its image before and after, own and others.
        equivalent: How many random images must go for the same mean change of the loss, and a 95 % interval; None
            without a ladder.
    """

    method: str
    k: int
    removed: float
    loss: Effect
    mse: Effect
    similarity: Effect
    equivalent: tuple[float, float, float] | None = None


def plan(
    rankings: Mapping[str, Mapping[str, Sequence[str]]], protocol: Protocol, training: Sequence[str]
) -> list[Removal]:
    """All removals of all methods and K, and as many at random.

    All methods share their pools, so that they are compared on the same others. The first method decides them: a method
    that is added later changes no model of the others.

    Args:
        rankings: Method -> query -> image ids, the most influential first.
        protocol: The protocol.
        training: Ids of the training set.

    Raises:
        ValueError: K is larger than a ranking, a pool would leave out too much, a ranking is of another data set, or a
            method has the name of one of the judge's own rows.
    """
    reserved = {RANDOM, FLOOR} & set(rankings)
    if reserved:
        raise ValueError(f"A method is called {min(reserved)!r}, as a row of the judge's own is: rename its file.")
    first_method = next(iter(rankings.values()))
    result: list[Removal] = []
    for k, size in protocol.stages():
        tops = {query: frozenset(top_of_ranking(ids, k, query)) for query, ids in first_method.items()}
        pools = pool_queries(tops, size)
        first: list[Removal] = []
        for method, by in rankings.items():
            removals = plan_removals(method, by, k, pools, training)
            first = first or removals
            result += removals
        for draw in range(protocol.random):
            result += random_removals(first, training, draw)
    return result


def judge(
    folder: Path,
    *,
    rankings: Mapping[str, Sequence[Scores]],
    sweep: Sweep,
    protocol: Protocol,
    again: Reattribution | None = None,
    costs: Mapping[str, Cost] = NO_COSTS,
) -> list[Row]:
    """Retrains without what the methods name, and measures every query on every model.

    Finished models and measurements are found again, so an interrupted sweep goes on. The table of results is written
    once its models are measured, and again with what `after` and `greedy` add to it.

    Args:
        folder: Where `counterfactual.json` goes.
        rankings: Method -> scores of all queries.
        sweep: Trains the models and measures the queries on them.
        protocol: What to leave out.
        again: Attributes under retrained models, for `after` and `greedy`.
        costs: Method -> what it took for these queries.

    Raises:
        ValueError: The plan cannot be carried out, or a training failed; what is finished is kept.
        StorageError: A file could not be written.
    """
    if again is None and (protocol.after or protocol.greedy):
        raise ValueError("protocol.after and protocol.greedy attribute again: give `again`, or leave both at 0.")
    named = {
        method: {scores.query.id: whole_ranking(scores) for scores in results} for method, results in rankings.items()
    }
    ids, seeds = sweep.retrains.ids, protocol.seeds
    removals = plan(named, protocol, ids)
    own = [group for group in by_method(removals) if group[0].method != RANDOM]
    halved = [halve(group, named[group[0].method], ids) for group in own] if protocol.groups else []
    halves = [removal for each in halved for removal in (*each.first, *each.second)]
    rounds = [removal for group in own for removal in group if again and again.asks_model(removal.method)]
    wanted = [Retrain((), seed) for seed in seeds]
    # One seed after the other: a sweep that is cut short has then judged all methods by the first.
    wanted += [Retrain(removal.ids, seed) for seed in seeds for removal in removals]
    wanted += [Retrain(removal.ids, seed) for seed in seeds for removal in halves]
    ladder = random_ladder(protocol.ladder, protocol.ladder_draws, ids)
    wanted += [Retrain(rung.ids, seed) for seed in seeds for rung in ladder]
    chosen = [covering(group, protocol.after) for group in own] if protocol.after else []
    if protocol.after:
        sweep.log(after_plan([removal for group in chosen for removal in group], costs, len(seeds) > 1))
    unmoved = [method for method in named if again and not again.asks_model(method)]
    if protocol.greedy:
        check_greedy(rounds, len(ids))
        sweep.log(greedy_plan(rounds, protocol.greedy, len(seeds), unmoved))
    measured = sweep.measure(wanted)
    rows = [_row(group, measured, protocol) for group in by_method(removals)]
    if ladder:
        rows = [_with_equivalent(row, ladder, measured, protocol) for row in rows]
    rows += _floor(measured, protocol)
    result = {
        **_facts(sweep, removals, protocol),
        "rows": [_as_json(row) for row in rows],
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "groups": [synergy_of(each, measured, seeds).as_json() for each in halved],
    }
    write_json(folder / RESULT, result)
    if again is not None and protocol.after:
        result |= _after(folder, chosen, named, again, seeds)
        write_json(folder / RESULT, result)
    if again is not None and protocol.greedy:
        collected = (
            remove_greedily(
                named, at_once=rounds, rounds=protocol.greedy, measured=measured, sweep=sweep, again=again, seeds=seeds
            )
            if rounds
            else []
        )
        result |= {"greedy": [each.as_json() for each in collected], "not_greedy": unmoved}
        write_json(folder / RESULT, result)
    return rows


def _facts(sweep: Sweep, removals: Sequence[Removal], protocol: Protocol) -> dict[str, Any]:
    """What was done, for whoever reads the table of results."""
    models = [_model(sweep, Removal(FLOOR, 0, (), ()), seed) for seed in protocol.seeds]
    return {
        "protocol": vars(protocol),
        "prompts": {query.id: query.prompt for query in sweep.panel.queries},
        "encoder": None if sweep.panel.encoder is None else type(sweep.panel.encoder).__name__,
        "training_pictures": len(sweep.retrains.ids),
        "models": models + [_model(sweep, removal, seed) for removal in removals for seed in protocol.seeds],
    }


def _after(
    folder: Path,
    chosen: Sequence[Sequence[Removal]],
    named: Mapping[str, Mapping[str, Sequence[str]]],
    again: Reattribution,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Who replaced what the methods named, as `counterfactual.json` keeps it; the images go beside it."""
    result = [replacements(named[group[0].method], group, again, *seeds[:2]) for group in chosen]
    shown = [name for each in result for one in each for name in (*one.before, *one.after)]
    return {
        "after": [one.as_json() for each in result for one in each],
        "foresight": [foreseen(each) for each in result],
        "shown": write_shown(folder, again.data.images, shown),
    }


def _model(sweep: Sweep, removal: Removal, seed: int) -> dict[str, Any]:
    """Which model a removal's is, for whoever looks for what it drew."""
    name = sweep.retrains.name(Retrain(removal.ids, seed))
    return {"name": name, "seed": seed, "method": removal.method, "k": removal.k, "queries": list(removal.queries)}


def _row(removals: Sequence[Removal], measured: Measured, protocol: Protocol) -> Row:
    result = effects(removals, measured, protocol.seeds)
    count = float(np.mean([len(removal.ids) for removal in removals]))
    return Row(removals[0].method, removals[0].k, count, result["loss"], result["mse"], result["similarity"])


def _with_equivalent(row: Row, ladder: Sequence[Removal], measured: Measured, protocol: Protocol) -> Row:
    """The row with its random equivalent: the change of the same queries' losses on the ladder's models."""
    rungs: dict[int, list[float]] = {}
    for rung in ladder:
        for seed in protocol.seeds:
            moved = changes(measured[Retrain((), seed)], measured[Retrain(rung.ids, seed)])
            rungs.setdefault(rung.k, []).append(float(np.mean([moved[query]["loss"] for query in row.loss.queries])))
    counts = sorted(rungs)
    result = random_equivalent(counts, [rungs[count] for count in counts], float(row.loss.own.mean()))
    return replace(row, equivalent=result)


def _floor(measured: Measured, protocol: Protocol) -> list[Row]:
    """What another seed alone changes, with no image left out."""
    if len(protocol.seeds) < 2:
        return []
    models = [measured[Retrain((), seed)] for seed in protocol.seeds]
    queries = tuple(sorted(models[0]))
    result: dict[str, Float[NDArray[np.float64], " q"]] = {}
    for kind in KINDS:
        result[kind] = np.array(
            [np.mean([abs(changes(models[0], other)[query][kind]) for other in models[1:]]) for query in queries]
        )
    nothing = np.full(len(queries), np.nan)
    loss, mse, similarity = (Effect(queries, result[kind], nothing) for kind in KINDS)
    return [Row(FLOOR, 0, 0.0, loss, mse, similarity)]


def as_table(rows: Sequence[Row], costs: Mapping[str, Cost] = NO_COSTS) -> str:
    """The table in Markdown: means over queries ± standard errors, and what each method took where that is known.

    Of the headline also the median, for a few queries may rise by ten times as much as the others.
    """
    titles = ["method", "K", "left out", "n", "ΔL own", "ΔL others", "ΔL own − others", "its median"]
    titles += ["MSE own", "similarity own"]
    with_ladder = any(row.equivalent is not None for row in rows)
    titles += ["as many as so many at random"] * with_ladder
    titles += ["seconds a query", "stored, MiB"] * bool(costs)
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row.method, str(row.k), f"{row.removed:.0f}", str(len(row.loss.queries))]
        difference = row.loss.difference
        cells += [_mean(row.loss.own), _mean(row.loss.others), _mean(difference), _median(difference)]
        cells += [_mean(row.mse.own), _mean(row.similarity.own)]
        if with_ladder:
            cells.append("–" if row.equivalent is None else "{:,.0f} ({:,.0f} to {:,.0f})".format(*row.equivalent))
        if costs:
            cost = costs.get(row.method)
            cells += ["–", "–"] if cost is None else [f"{cost.seconds:.3g}", f"{cost.stored / 2**20:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Float[NDArray[np.float64], " q"]) -> str:
    return number(or_none(estimate(values)))


def _median(values: Float[NDArray[np.float64], " q"]) -> str:
    known = values[np.isfinite(values)]
    return f"{np.median(known):.3g}" if len(known) else "–"


def _as_json(row: Row) -> dict[str, Any]:
    kinds = {"loss": row.loss, "mse": row.mse, "similarity": row.similarity}
    return {
        "method": row.method,
        "k": row.k,
        "removed": row.removed,
        # JSON knows no infinity: null is beyond the ladder's end.
        "equivalent": None if row.equivalent is None else or_none(row.equivalent),
        "queries": list(row.loss.queries),
        **{name: {"own": or_none(each.own), "others": or_none(each.others)} for name, each in kinds.items()},
    }
