"""One attribution run: queries in, a run folder with ranking, manifest, images and report out."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from wherefrom.attributors.base import Attributor
from wherefrom.data.image_set import ImageSet
from wherefrom.gradients.loss_excess import excess, loss_of, typical_losses
from wherefrom.gradients.query_loss import encode_query
from wherefrom.metrics.null_distribution import p_values
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.rankings.estimates import Estimates
from wherefrom.rankings.ranking_file import write_parts, write_ranking
from wherefrom.rankings.score_table import PART_ROWS, ScoreTable
from wherefrom.reports.attribution_report import write_report
from wherefrom.reports.query_section import ReportOptions, page_of
from wherefrom.runtime.artifacts import (
    MANIFEST,
    Store,
    check_identity,
    identity_hash,
    read_manifest,
    replacing,
    write_manifest,
)
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner

TABLE = "scores_of_all"
_PART, _ESTIMATE = "part ", "estimate "  # before the name of a part, or of an end of an estimate, in a file of scores


def run_identity(
    attributor: Attributor, data: TrainingData, model: DiffusionModel | None, queries: Sequence[Query], store: Store
) -> dict[str, Any]:
    """What must match for a run folder to be gone on with."""
    gone = attributor.removed(data, store)
    return {
        "attributor": attributor.identity(),
        "model": None if model is None else model.fingerprint(),
        "training_pictures": identity_hash({"of": data.images.fingerprint, "ids": list(data.images.ids)}),
        "latents": None if data.latents is None else data.latents.fingerprint,
        "held_out": None
        if data.held_out is None
        else identity_hash({"of": data.held_out.fingerprint, "ids": list(data.held_out.ids)}),
        "queries": [_query_identity(query) for query in queries],
        **({"taken_down": identity_hash({"ids": sorted(gone)})} if gone else {}),
    }


def _query_identity(query: Query) -> list[str]:
    """Name and prompt, and where only a part is asked for, which."""
    part = [] if query.region is None else [hashlib.blake2b(query.region.mask.tobytes()).hexdigest()]
    return [query.name, query.prompt, *part]


def attribute(
    folder: Path,
    *,
    attributor: Attributor,
    data: TrainingData,
    model: DiffusionModel | None,
    queries: Sequence[Query],
    store: Store,
    runner: Runner,
    options: ReportOptions | None = ReportOptions(),
    log: Log = no_log,
    cut: int | None = None,
) -> list[Scores]:
    """Attributes the queries and leaves ranking, manifest, images and report in the folder.

    Queries that an interrupted run has finished are not scored again.

    Args:
        folder: The run folder.
        attributor: The method.
        data: Training images and the null.
        model: The model, for methods that require one.
        queries: The queries.
        store: Where the method keeps what it makes.
        runner: This process's place.
        options: What the page shows; None makes no page, nor any image of a query.
        log: Receives lines about what is being done.
        cut: The ranking names only the first so many images of each query; the scores of all are in parts below
            `scores_of_all` (`ScoreTable`). For training sets too large for one table.

    Raises:
        ArtifactMismatchError: The folder holds a run with other settings, or images were taken down since.
        StorageError: The folder could not be written; finished queries are kept.
        ValueError: Two queries have the same name, or the method cannot attribute one; see the attributor.
    """
    if options is not None:
        options.columns(data.images)
    names = [query.name for query in queries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two queries are called {twice[0]!r}: give each its own id, results are told apart by it.")
    attributor.check(queries)
    identity = run_identity(attributor, data, model, queries, store)
    if (folder / MANIFEST).exists():
        check_identity(folder, identity)
    elif runner.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, identity, complete=False)
    finished = {
        query.name: scores for query in queries if (scores := _read_scores(folder, query, data.images)) is not None
    }
    if len(finished) < len(queries):
        if finished:
            log(f"{len(finished)} of {len(queries)} queries are already done in {folder}")
        waiting = [query for query in queries if query.name not in finished]
        measured = _representation(attributor, data=data, model=model, queries=waiting, store=store, runner=runner)
        attributor.fit(data, model, store, runner, log)
        started = time.monotonic()
        for result in attributor.score(waiting):
            facts = {**result.facts, **measured.get(result.query.name, {}), "seconds": time.monotonic() - started}
            scores = replace(result, facts=facts)
            started = time.monotonic()
            finished[scores.query.name] = scores
            if runner.is_main:
                _write_scores(folder, scores)
            part = "" if scores.query.region is None else f", {scores.query.region.name}"
            log(f"query {len(finished)} of {len(queries)} is done: {scores.query.prompt!r}{part}")
    results = [finished[query.name] for query in queries]
    if runner.is_main:
        _write_results(
            folder, results=results, data=data, options=options, identity=identity, attributor=attributor, cut=cut
        )
    runner.barrier()
    return results


def _representation(
    attributor: Attributor,
    *,
    data: TrainingData,
    model: DiffusionModel | None,
    queries: Sequence[Query],
    store: Store,
    runner: Runner,
) -> dict[str, dict[str, float]]:
    """How far each query's loss lies above training images', where the method asks a model; see `excess`."""
    if "model" not in attributor.requires or model is None or data.latents is None or model.encoder is None:
        return {}
    typical = typical_losses(model, data.latents, store, runner)
    result = {}
    for query in queries:
        seen = encode_query(model, query)
        result[query.name] = {"loss_excess": excess(loss_of(model, seen.latent, seen.states), typical)}
    return result


def _scores_file(folder: Path, query: Query) -> Path:
    return folder / "scores" / f"{identity_hash({'query': query.name})}.safetensors"


def _write_scores(folder: Path, scores: Scores) -> None:
    facts = json.dumps({name: value for name, value in scores.facts.items() if math.isfinite(value)})
    with replacing(_scores_file(folder, scores.query)) as temporary:
        arrays = {"scores": scores.scores, "null": scores.null}
        arrays |= {_PART + name: values for name, values in scores.parts.items()}
        arrays |= {} if scores.estimates is None else {_ESTIMATE + n: v for n, v in vars(scores.estimates).items()}
        save_file(arrays, temporary, {"facts": facts, "parts": json.dumps(list(scores.parts))})


def _read_scores(folder: Path, query: Query, images: ImageSet) -> Scores | None:
    path = _scores_file(folder, query)
    if not path.exists():
        return None
    from safetensors import safe_open

    with safe_open(path, "np") as stream:
        metadata = stream.metadata()
        facts: dict[str, float] = json.loads(metadata["facts"])
        names: list[str] = json.loads(metadata["parts"])
    arrays = load_file(path)
    parts = {name: arrays[_PART + name] for name in names}
    estimated = {name.removeprefix(_ESTIMATE): values for name, values in arrays.items() if name.startswith(_ESTIMATE)}
    estimates = Estimates(**estimated) if estimated else None
    return Scores(query, images.ids, arrays["scores"], arrays["null"], facts, parts, estimates)


def _write_results(
    folder: Path,
    *,
    results: Sequence[Scores],
    data: TrainingData,
    options: ReportOptions | None,
    identity: Mapping[str, Any],
    attributor: Attributor,
    cut: int | None,
) -> None:
    rankings: dict[str, tuple[Sequence[str], Any]] = {each.query.name: (each.ids, each.scores) for each in results}
    if cut is not None:
        table = write_table(folder / TABLE, results)
        rankings = {name: table.top(name, cut) for name in rankings}
    with_null = all(len(scores.null) for scores in results)
    nulls = {scores.query.name: scores.null for scores in results}
    tail = {name: p_values(kept, nulls[name]) for name, (_, kept) in rankings.items()} if with_null else None
    estimates = {
        scores.query.name: (scores.ids, scores.estimates) for scores in results if scores.estimates is not None
    }
    write_ranking(folder, rankings, tail, estimates or None)
    if all(scores.parts for scores in results):
        write_parts(folder, {scores.query.name: (scores.ids, scores.parts) for scores in results})
    if options is not None:
        _write_page(folder, results=results, data=data, options=options, identity=identity, attributor=attributor)
    write_manifest(
        folder,
        identity,
        complete=True,
        cut=cut,
        facts={scores.query.name: {k: v for k, v in scores.facts.items() if math.isfinite(v)} for scores in results},
    )


def write_table(folder: Path, results: Sequence[Scores]) -> ScoreTable:
    """All scores of all queries in parts, which hold one stretch of the images each."""
    ids = results[0].ids
    assert all(scores.ids == ids for scores in results)
    table = ScoreTable(folder, [scores.query.name for scores in results])
    for number, start in enumerate(range(0, len(ids), PART_ROWS)):
        rows = slice(start, start + PART_ROWS)
        table.write(number, ids[rows], np.stack([scores.scores[rows] for scores in results]))
    return table


def _write_page(
    folder: Path,
    *,
    results: Sequence[Scores],
    data: TrainingData,
    options: ReportOptions,
    identity: Mapping[str, Any],
    attributor: Attributor,
) -> None:
    for scores in results:
        with replacing(folder / "queries" / f"{_scores_file(folder, scores.query).stem}.png") as temporary:
            Image.fromarray(scores.query.pixels).save(temporary, "PNG")
    pages = [page_of(scores, data, options) for scores in results]
    method = str(attributor.identity()["method"])
    write_report(
        folder / "report.html",
        title=options.title,
        queries=pages,
        facts={
            "Method": method,
            "Model": str(identity["model"]),
            "Training images": f"{len(data.images):,}",
            "Images never trained on (the null)": f"{0 if data.held_out is None else len(data.held_out):,}",
        },
        methods_note="Shares of groups are of the influence above the median among the images shown; "
        "intervals are 95 % bootstrap.",
    )


def read_run(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        ValueError: The run is not complete.
    """
    manifest = read_manifest(folder)
    if not manifest.get("complete"):
        raise ValueError(
            f"{folder} is not complete: run the same evaluate.py attribute command again, it goes on where it stopped."
        )
    return manifest
