"""Comparison command: several methods on the same queries, with costs, rank correlations and a joint report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wherefrom.attributors.base import Attributor
from wherefrom.commands.attribute import attribute
from wherefrom.metrics.rank_correlation import correlations
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.reports.comparison_report import median_reliability, write_comparison_report
from wherefrom.reports.query_section import ReportOptions
from wherefrom.runtime.artifacts import Store, replacing, write_json
from wherefrom.runtime.checked_files import read_object
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.measured_cost import Cost, track_peak_memory

COST, METHODS, CORRELATIONS, REPORT = "cost.json", "methods.parquet", "correlations.parquet", "report.html"


def _size(*folders: Path) -> int:
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def compare(
    folder: Path,
    *,
    methods: Mapping[str, Attributor],
    data: TrainingData,
    model: DiffusionModel | None,
    queries: Sequence[Query],
    store: Store,
    runner: Runner,
    options: ReportOptions = ReportOptions(),
    log: Log = no_log,
) -> dict[str, list[Scores]]:
    """Runs every method on the same queries; writes a table of methods, a table of correlations and a report.

    Each method has a run folder of `attribute` below `folder`; finished queries are not scored again.

    Args:
        folder: The run folder.
        methods: Name -> method, in the order of the table.
        data: Training images, and held-out images for the null distribution.
        model: The model, for methods that require one.
        queries: The queries.
        store: Store of the methods' artifacts.
        runner: Device and rank of this process.
        options: Options of the reports.
        log: Receives progress messages.

    Raises:
        ValueError: There are no methods, or a method cannot attribute a query; see the attributor.
        ArtifactMismatchError: A method's folder holds a run with other settings.
        StorageError: The folder could not be written; finished queries are kept.
    """
    if not methods:
        raise ValueError("There are no methods to compare: name attributor files in `methods`.")
    results: dict[str, list[Scores]] = {}
    costs: dict[str, Cost] = {}
    for number, (name, method) in enumerate(methods.items(), start=1):
        log(f"{name}: method {number} of {len(methods)}")
        results[name], costs[name] = attribute_at_cost(
            folder / name,
            method=method,
            data=data,
            model=model,
            queries=queries,
            store=store,
            runner=runner,
            options=options,
            log=log,
        )
    if runner.is_main:
        _write_tables(folder, results, costs)
        noted = replace(options, notes=[*options.notes, *(() if model is None else model.notes)])
        write_comparison_report(folder / REPORT, results, costs, data.images, noted)
    runner.barrier()
    return results


def attribute_at_cost(
    place: Path,
    *,
    method: Attributor,
    data: TrainingData,
    model: DiffusionModel | None,
    queries: Sequence[Query],
    store: Store,
    runner: Runner,
    options: ReportOptions = ReportOptions(),
    log: Log = no_log,
) -> tuple[list[Scores], Cost]:
    """Runs `attribute` and measures its cost, which the main process writes to `cost.json`.

    Other processes report their own time and memory, and a storage of 0.
    """
    before = _size(place)
    # A separate store records which artifacts this method used, even if another method built them before.
    own = Store(store.root)
    with track_peak_memory() as memory:
        results = attribute(
            place,
            attributor=method,
            data=data,
            model=model,
            queries=queries,
            store=own,
            runner=runner,
            options=options,
            log=log,
        )
    for artifact, made in own.touched.items():
        store.touched[artifact] = store.touched.get(artifact, False) or made
    if not runner.is_main:
        return results, Cost(_seconds(results), memory[0], 0)
    now = Cost(_seconds(results), memory[0], _size(place, *own.touched))
    return results, _cost(place, now, scored=_size(place) > before)


def _seconds(results: Sequence[Scores]) -> float:
    return float(np.mean([scores.facts.get("seconds", float("nan")) for scores in results]))


def _cost(place: Path, now: Cost, scored: bool) -> Cost:
    """Combines the cost of this run with that of earlier, interrupted runs: the maximum of each."""
    cost = now
    if (place / COST).exists():
        earlier = Cost(**read_object(place / COST, remedy="Delete it: only what earlier runs took is lost"))
        memory, stored = max(now.memory, earlier.memory), max(now.stored, earlier.stored)
        cost = Cost(now.seconds, memory, stored) if scored else replace(earlier, seconds=now.seconds)
    write_json(place / COST, asdict(cost))
    return cost


def _write_tables(folder: Path, results: Mapping[str, Sequence[Scores]], costs: Mapping[str, Cost]) -> None:
    names = list(results)
    columns = {
        "method": names,
        "seconds_per_query": [costs[name].seconds for name in names],
        "peak_memory_bytes": [costs[name].memory for name in names],
        "stored_bytes": [costs[name].stored for name in names],
        "split_half_reliability": [median_reliability(results[name]) for name in names],
    }
    with replacing(folder / METHODS) as temporary:
        pq.write_table(pa.table(columns), temporary)
    mean, error, counts = correlations({name: [each.scores for each in result] for name, result in results.items()})
    pairs = [(i, j) for i in range(len(names)) for j in range(len(names))]
    with replacing(folder / CORRELATIONS) as temporary:
        pq.write_table(
            pa.table(
                {
                    "method": [names[i] for i, _ in pairs],
                    "other": [names[j] for _, j in pairs],
                    "spearman": [mean[pair] for pair in pairs],
                    "standard_error": [error[pair] for pair in pairs],
                    "queries": [int(counts[pair]) for pair in pairs],
                }
            ),
            temporary,
        )
