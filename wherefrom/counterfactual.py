"""The judge: retrain without the pictures that a method names, and see whether the generated picture is gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.attributors.base import Scores
from wherefrom.evaluation.removal import (
    RANDOM,
    Effect,
    Removal,
    effect_of,
    plan_removals,
    pool_queries,
    random_equivalent,
    random_ladder,
    random_removals,
    top_of_ranking,
)
from wherefrom.retraining import Measurement, Retrain
from wherefrom.storage import write_json
from wherefrom.sweep import Sweep

RESULT = "counterfactual.json"
PICTURES = "pictures"  # folder of what each model draws
FLOOR = "another seed"


@dataclass(frozen=True)
class Protocol:
    """How many pictures go, for how many queries at once, and how often.

    Attributes:
        ks: Pictures of each query that a retraining leaves out.
        pools: For each K, queries whose pictures one retraining leaves out; a single number serves for all K. 1 is the
            papers' protocol.
        seeds: Seeds of the trainings; each has its own model with all pictures.
        random: How many times as many pictures are left out at random for each pool.
        timesteps: Timesteps of the queries' losses (AbU, section 5.1: 200).
        ladder: Numbers of pictures that are left out at random, to say how many random pictures do as much as those
            that a method names (AbU, section 5.1: up to the whole set). Empty leaves that out.
        ladder_draws: Models on each rung.
    """

    ks: list[int] = field(default_factory=lambda: [16])
    pools: list[int] = field(default_factory=lambda: [5])
    seeds: list[int] = field(default_factory=lambda: [0])
    random: int = 1
    timesteps: int = 200
    ladder: list[int] = field(default_factory=list)
    ladder_draws: int = 3

    def __post_init__(self) -> None:
        if min(self.ks, default=0) < 1 or min(self.pools, default=0) < 1 or not self.seeds or self.random < 0:
            raise ValueError(
                "ks, pools and seeds need positive numbers and random must not be negative; given ks "
                f"{self.ks}, pools {self.pools}, seeds {self.seeds}, random {self.random}."
            )
        if len(self.pools) not in (1, len(self.ks)):
            raise ValueError(f"pools must hold one number, or one for each of ks {self.ks}; given {self.pools}.")

    def stages(self) -> list[tuple[int, int]]:
        """(K, queries in a pool) of each stage."""
        return list(zip(self.ks, self.pools * (len(self.ks) // len(self.pools)), strict=True))


@dataclass(frozen=True)
class Row:
    """One line of the judge's table.

    Attributes:
        method: Whose pictures went; `random`, or `another seed` for the floor.
        k: How many of each query.
        removed: Mean number of pictures that went.
        loss: Change of each query's loss, own and others.
        mse: Change of its picture, own and others.
        similarity: Similarity of its picture before and after, own and others.
        equivalent: How many random pictures must go for the same mean change of the loss, and a 95 % interval; None
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
        rankings: Method -> query -> picture ids, the most influential first.
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
    found: list[Removal] = []
    for k, size in protocol.stages():
        tops = {query: frozenset(top_of_ranking(ids, k, query)) for query, ids in first_method.items()}
        pools = pool_queries(tops, size)
        first: list[Removal] = []
        for method, by in rankings.items():
            removals = plan_removals(method, by, k, pools, training)
            first = first or removals
            found += removals
        for draw in range(protocol.random):
            found += random_removals(first, training, draw)
    return found


def judge(folder: Path, rankings: Mapping[str, Sequence[Scores]], sweep: Sweep, protocol: Protocol) -> list[Row]:
    """Retrains without what the methods name, and measures every query on every model.

    Finished models and measurements are found again, so an interrupted sweep goes on.

    Args:
        folder: Where `counterfactual.json` goes.
        rankings: Method -> scores of all queries.
        sweep: Trains the models and measures the queries on them.
        protocol: What to leave out.

    Raises:
        ValueError: The plan cannot be carried out, or a training failed; what is finished is kept.
        StorageError: A file could not be written.
    """
    named = {
        method: {scores.query.id: [name for name, _ in scores.top(len(scores.ids))] for scores in results}
        for method, results in rankings.items()
    }
    removals = plan(named, protocol, sweep.retrains.ids)
    wanted = [Retrain((), seed) for seed in protocol.seeds]
    # One seed after the other: a sweep that is cut short has then judged all methods by the first.
    wanted += [Retrain(removal.ids, seed) for seed in protocol.seeds for removal in removals]
    ladder = random_ladder(protocol.ladder, protocol.ladder_draws, sweep.retrains.ids)
    wanted += [Retrain(rung.ids, seed) for seed in protocol.seeds for rung in ladder]
    measured = sweep.measure(wanted)
    rows = [_row(group, measured, protocol) for group in _groups(removals)]
    if ladder:
        rows = [_with_equivalent(row, ladder, measured, protocol) for row in rows]
    rows += _floor(measured, protocol)
    models = [_model(sweep, Removal(FLOOR, 0, (), ()), seed) for seed in protocol.seeds]
    models += [_model(sweep, removal, seed) for removal in removals for seed in protocol.seeds]
    result = {
        "protocol": vars(protocol),
        "prompts": {query.id: query.prompt for query in sweep.panel.queries},
        "encoder": None if sweep.panel.encoder is None else type(sweep.panel.encoder).__name__,
        "training_pictures": len(sweep.retrains.ids),
        "models": models,
        "rows": [_as_json(row) for row in rows],
    }
    write_json(folder / RESULT, result)
    return rows


def _model(sweep: Sweep, removal: Removal, seed: int) -> dict[str, Any]:
    """Which model a removal's is, for whoever looks for what it drew."""
    name = sweep.retrains.name(Retrain(removal.ids, seed))
    return {"name": name, "seed": seed, "method": removal.method, "k": removal.k, "queries": list(removal.queries)}


def _groups(removals: Sequence[Removal]) -> list[list[Removal]]:
    """The removals of each method and K."""
    found: dict[tuple[str, int], list[Removal]] = {}
    for removal in removals:
        found.setdefault((removal.method, removal.k), []).append(removal)
    return list(found.values())


def _row(removals: Sequence[Removal], measured: Mapping[Retrain, Mapping[str, Measurement]], protocol: Protocol) -> Row:
    changes: dict[str, list[dict[str, float]]] = {"loss": [], "mse": [], "similarity": []}
    for removal in removals:
        by_seed = [
            _changes(measured[Retrain((), seed)], measured[Retrain(removal.ids, seed)]) for seed in protocol.seeds
        ]
        for kind, found in changes.items():
            found.append({query: float(np.mean([each[query][kind] for each in by_seed])) for query in by_seed[0]})
    effects = {kind: effect_of(removals, found) for kind, found in changes.items()}
    count = float(np.mean([len(removal.ids) for removal in removals]))
    return Row(removals[0].method, removals[0].k, count, effects["loss"], effects["mse"], effects["similarity"])


def _with_equivalent(
    row: Row, ladder: Sequence[Removal], measured: Mapping[Retrain, Mapping[str, Measurement]], protocol: Protocol
) -> Row:
    """The row with its random equivalent: the change of the same queries' losses on the ladder's models."""
    rungs: dict[int, list[float]] = {}
    for rung in ladder:
        for seed in protocol.seeds:
            changes = _changes(measured[Retrain((), seed)], measured[Retrain(rung.ids, seed)])
            rungs.setdefault(rung.k, []).append(float(np.mean([changes[query]["loss"] for query in row.loss.queries])))
    counts = sorted(rungs)
    found = random_equivalent(counts, [rungs[count] for count in counts], float(row.loss.own.mean()))
    return replace(row, equivalent=found)


def _changes(before: Mapping[str, Measurement], after: Mapping[str, Measurement]) -> dict[str, dict[str, float]]:
    """Query -> what changed between two models of one seed; pictures are compared with the query itself."""
    return {
        query: {"loss": found.loss - before[query].loss, "mse": found.mse, "similarity": found.similarity}
        for query, found in after.items()
    }


def _floor(measured: Mapping[Retrain, Mapping[str, Measurement]], protocol: Protocol) -> list[Row]:
    """What another seed alone changes, with no picture left out."""
    if len(protocol.seeds) < 2:
        return []
    models = [measured[Retrain((), seed)] for seed in protocol.seeds]
    queries = tuple(sorted(models[0]))
    found: dict[str, Float[NDArray[np.float64], "q"]] = {}
    for kind in ("loss", "mse", "similarity"):
        found[kind] = np.array(
            [np.mean([abs(_changes(models[0], other)[query][kind]) for other in models[1:]]) for query in queries]
        )
    nothing = np.full(len(queries), np.nan)
    loss, mse, similarity = (Effect(queries, found[kind], nothing) for kind in ("loss", "mse", "similarity"))
    return [Row(FLOOR, 0, 0.0, loss, mse, similarity)]


def estimate(values: Float[NDArray[np.float64], "q"]) -> tuple[float, float]:
    """Mean and standard error of what is a number."""
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return float("nan"), float("nan")
    return float(known.mean()), float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")


def as_table(rows: Sequence[Row]) -> str:
    """The table in Markdown: means over queries ± standard errors."""
    titles = ["method", "K", "left out", "n", "ΔL own", "ΔL others", "ΔL own − others", "MSE own", "similarity own"]
    with_ladder = any(row.equivalent is not None for row in rows)
    titles += ["as many as so many at random"] * with_ladder
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row.method, str(row.k), f"{row.removed:.0f}", str(len(row.loss.queries))]
        for values in (row.loss.own, row.loss.others, row.loss.difference, row.mse.own, row.similarity.own):
            mean, error = estimate(values)
            cells.append(f"{mean:.3g} ± {error:.1g}" if np.isfinite(mean) else "–")
        if with_ladder:
            cells.append("–" if row.equivalent is None else "{:,.0f} ({:,.0f} to {:,.0f})".format(*row.equivalent))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _as_json(row: Row) -> dict[str, Any]:
    def numbers(effect: Effect) -> dict[str, Any]:
        return {
            name: [None if np.isnan(value) else value for value in values.tolist()]
            for name, values in (("own", effect.own), ("others", effect.others))
        }

    effects = {"loss": row.loss, "mse": row.mse, "similarity": row.similarity}
    return {
        "method": row.method,
        "k": row.k,
        "removed": row.removed,
        # JSON knows no infinity: null is beyond the ladder's end.
        "equivalent": None
        if row.equivalent is None
        else [each if np.isfinite(each) else None for each in row.equivalent],
        "queries": list(row.loss.queries),
        **{name: numbers(effect) for name, effect in effects.items()},
    }
