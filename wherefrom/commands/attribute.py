"""Attribution command: scores queries and writes a run folder with ranking, manifest, images and report."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from wherefrom.attributors.base import Attributor
from wherefrom.data.image_set import ImageSet
from wherefrom.gradients.loss_excess import excess, loss_of, typical_losses
from wherefrom.gradients.query_loss import encode_query
from wherefrom.metrics.null_distribution import p_values
from wherefrom.models.adapter_states import AdapterRecord, known_adapters
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.generation_metadata import GenerationMetadata
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.rankings.estimates import Estimates
from wherefrom.rankings.ranking_file import write_parts, write_ranking
from wherefrom.rankings.score_table import PART_ROWS, ScoreTable
from wherefrom.reports.attribution_report import write_report
from wherefrom.reports.image_facts import image_facts
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
_PART, _ESTIMATE = "part ", "estimate "  # key prefixes of parts and of calibrated estimates in a score file
_PER_COPY = "per_copy"


def run_identity(
    attributor: Attributor, data: TrainingData, model: DiffusionModel | None, queries: Sequence[Query], store: Store
) -> dict[str, Any]:
    """Identity of a run: what must match for a run folder to be resumed."""
    removed = attributor.removed(data, store)
    return {
        "attributor": attributor.identity(),
        "model": None if model is None else model.fingerprint(),
        "training_pictures": identity_hash({"of": data.images.weighted_fingerprint, "ids": list(data.images.ids)}),
        "latents": None if data.latents is None else data.latents.fingerprint,
        "held_out": None
        if data.held_out is None
        else identity_hash({"of": data.held_out.fingerprint, "ids": list(data.held_out.ids)}),
        "queries": [_query_identity(query) for query in queries],
        **({"taken_down": identity_hash({"ids": sorted(removed)})} if removed else {}),
    }


def _query_identity(query: Query) -> list[str]:
    """Name and prompt of a query, and the hash of its region if it has one."""
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
    """Attributes queries and writes ranking, manifest, images and report to the folder.

    An interrupted run is resumed: finished queries are not scored again.

    Args:
        folder: The run folder.
        attributor: The method.
        data: Training images, and held-out images for the null distribution.
        model: The model, for methods that require one.
        queries: The queries.
        store: Store of the method's artifacts.
        runner: Device and rank of this process.
        options: Options of the report; None writes neither a report nor images of the queries.
        log: Receives progress messages.
        cut: Number of images per query in the ranking; the scores of all are in parts below `scores_of_all`
            (`ScoreTable`). For training sets too large for one table.

    Raises:
        ArtifactMismatchError: The folder holds a run with other settings, or images were removed since.
        StorageError: The folder could not be written; finished queries are kept.
        ValueError: Two queries have the same name, or the method cannot attribute one; see the attributor.
    """
    if options is not None:
        options.columns(data.images)
        options = replace(options, notes=[*options.notes, *(() if model is None else model.notes)])
    names = [query.name for query in queries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two queries are called {twice[0]!r}: give each a unique id, which identifies its results.")
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
        pending = [query for query in queries if query.name not in finished]
        excesses = _loss_excesses(attributor, data=data, model=model, queries=pending, store=store, runner=runner)
        attributor.fit(data, model, store, runner, log)
        started = time.monotonic()
        for scored in attributor.score(pending):
            facts = {**scored.facts, **excesses.get(scored.query.name, {}), "seconds": time.monotonic() - started}
            scores = replace(scored, facts=facts)
            started = time.monotonic()
            finished[scores.query.name] = scores
            if runner.is_main:
                _write_scores(folder, scores)
            part = "" if scores.query.region is None else f", {scores.query.region.name}"
            log(f"query {len(finished)} of {len(queries)} is done: {scores.query.prompt!r}{part}")
    results = [finished[query.name] for query in queries]
    if runner.is_main:
        adapters = [] if model is None else [asdict(each) for each in known_adapters(model.denoiser)]
        _write_results(
            folder, results=results, data=data, options=options, identity=identity, cut=cut, adapters=adapters
        )
    runner.barrier()
    return results


def _loss_excesses(
    attributor: Attributor,
    *,
    data: TrainingData,
    model: DiffusionModel | None,
    queries: Sequence[Query],
    store: Store,
    runner: Runner,
) -> dict[str, dict[str, float]]:
    """Measures how far each query's loss exceeds that of training images, if the method needs a model; see `excess`."""
    if "model" not in attributor.requires or model is None or data.latents is None or model.encoder is None:
        return {}
    typical = typical_losses(model, data.latents, store, runner)
    result = {}
    for query in queries:
        seen = encode_query(model, query)
        result[query.name] = {"loss_excess": excess(loss_of(model, seen.latent, seen.conditioning), typical)}
    return result


def _scores_file(folder: Path, query: Query) -> Path:
    return folder / "scores" / f"{identity_hash({'query': query.name})}.safetensors"


def _pixels_file(folder: Path, name: str) -> Path:
    return folder / "queries" / f"{identity_hash({'query': name})}.png"


def _write_scores(folder: Path, scores: Scores) -> None:
    facts = json.dumps({name: value for name, value in scores.facts.items() if math.isfinite(value)})
    with replacing(_scores_file(folder, scores.query)) as temporary:
        arrays = {"scores": scores.scores, "null": scores.null}
        arrays |= {_PART + name: values for name, values in scores.parts.items()}
        arrays |= {} if scores.estimates is None else {_ESTIMATE + n: v for n, v in vars(scores.estimates).items()}
        arrays |= {} if scores.per_copy is None else {_PER_COPY: scores.per_copy}
        save_file(arrays, temporary, {"facts": facts, "parts": json.dumps(list(scores.parts))})


def _read_scores(folder: Path, query: Query, images: ImageSet) -> Scores | None:
    path = _scores_file(folder, query)
    if not path.exists():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as stream:
            metadata = stream.metadata()
            facts: dict[str, float] = json.loads(metadata["facts"])
            names: list[str] = json.loads(metadata["parts"])
        arrays = load_file(path)
        parts = {name: arrays[_PART + name] for name in names}
        if len(arrays["scores"]) != len(images):
            raise ValueError(f"it holds {len(arrays['scores'])} scores of {len(images)} images")
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete the file: its query is then scored again.") from error
    estimated = {name.removeprefix(_ESTIMATE): values for name, values in arrays.items() if name.startswith(_ESTIMATE)}
    estimates = Estimates(**estimated) if estimated else None
    per_copy = arrays.get(_PER_COPY)
    return Scores(query, images.ids, arrays["scores"], arrays["null"], facts, parts, estimates, per_copy)


def _write_results(
    folder: Path,
    *,
    results: Sequence[Scores],
    data: TrainingData,
    options: ReportOptions | None,
    identity: Mapping[str, Any],
    cut: int | None,
    adapters: Sequence[Mapping[str, Any]],
) -> None:
    rankings: dict[str, tuple[Sequence[str], Any]] = {each.query.name: (each.ids, each.scores) for each in results}
    if cut is not None:
        table = write_table(folder / TABLE, results)
        rankings = {name: table.top(name, cut) for name in rankings}
    with_null = all(len(scores.null) for scores in results)
    by_query = {scores.query.name: scores for scores in results}
    tails = {name: _tails(by_query[name], kept) for name, (kept, _) in rankings.items()} if with_null else None
    estimates = {
        scores.query.name: (scores.ids, scores.estimates) for scores in results if scores.estimates is not None
    }
    images = data.images
    repeats = None if images.weights is None else dict(zip(images.ids, images.weights.astype(int), strict=True))
    write_ranking(folder, rankings, tails, estimates or None, repeats)
    if all(scores.parts for scores in results):
        write_parts(folder, {scores.query.name: (scores.ids, scores.parts) for scores in results})
    if options is not None:
        _write_page(folder, results=results, data=data, options=options, identity=identity, adapters=adapters)
    # What image files say of themselves decides nothing but the prompt, which is in the identity.
    stated = {
        each.query.name: {**each.query.metadata.as_json(), "prompt_is_used": each.query.own_prompt}
        for each in results
        if each.query.metadata is not None
    }
    write_manifest(
        folder,
        identity,
        complete=True,
        cut=cut,
        **({"adapters": adapters} if adapters else {}),
        facts={scores.query.name: {k: v for k, v in scores.facts.items() if math.isfinite(v)} for scores in results},
        **({"stated": stated} if stated else {}),
    )


def _tails(scores: Scores, kept: Sequence[str]) -> Float[NDArray[np.float64], " k"]:
    """p-values of the images that a ranking keeps, from the scores that compare with the null."""
    values = p_values(scores.comparable, scores.null)
    if len(kept) == len(values):  # all, in their own order
        return values
    place = {name: index for index, name in enumerate(scores.ids)}
    return values[[place[name] for name in kept]]


def write_table(folder: Path, results: Sequence[Scores]) -> ScoreTable:
    """Writes the scores of all images and queries as a `ScoreTable`, whose parts hold one range of images each."""
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
    adapters: Sequence[Mapping[str, Any]],
) -> None:
    for scores in results:
        with replacing(_pixels_file(folder, scores.query.name)) as temporary:
            Image.fromarray(scores.query.pixels).save(temporary, "PNG")
    pages = [page_of(scores, data, options) for scores in results]
    method = str(identity["attributor"]["method"])
    loras = ", ".join(str(AdapterRecord(**each)) for each in adapters)
    write_report(
        folder / "report.html",
        title=options.title,
        queries=pages,
        facts={
            "Method": method,
            "Model": f"{identity['model']}{f' with LoRA {loras}' if loras else ''}",
            "Training images": f"{len(data.images):,}",
            **image_facts(data.images),
            **({} if data.held_out is None else {"Images never trained on (the null)": f"{len(data.held_out):,}"}),
        },
        notes=options.notes,
        methods_note="Shares of groups are of the influence above the median among the images shown; "
        "intervals are 95 % bootstrap.",
    )


def read_run(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a run folder.

    Raises:
        ValueError: The run is not complete.
    """
    manifest = read_manifest(folder)
    if not manifest.get("complete"):
        raise ValueError(f"{folder} is not complete: run the same command again, it goes on where it stopped.")
    return manifest


def kept_queries(folder: Path) -> list[Query]:
    """The queries of a finished run as it keeps them: name, prompt and pixels, with regions in the name only.

    Raises:
        ValueError: The run is not complete, or was made without a page.
    """
    queries, manifest = [], read_run(folder)
    for name, prompt, *_ in manifest["identity"]["queries"]:
        file = _pixels_file(folder, name)
        if not file.is_file():
            raise ValueError(f"{folder} keeps no image of query {name!r}: it was made without a page.")
        with Image.open(file, formats=["PNG"]) as image:
            query = Query(name, prompt, np.asarray(image.convert("RGB")))
        stated = dict(manifest.get("stated", {}).get(name, {}))
        own = bool(stated.pop("prompt_is_used", False))
        metadata = GenerationMetadata.from_json(stated) if stated else None
        queries.append(replace(query, metadata=metadata, own_prompt=own))
    return queries


def kept_scores(folder: Path, queries: Sequence[Query], images: ImageSet) -> list[Scores]:
    """The scores of a finished run.

    Args:
        folder: The run folder.
        queries: Its queries, by their names.
        images: The training images that it scored.

    Raises:
        ValueError: The run lacks a query's scores, or has those of other images.
    """
    results = []
    for query in queries:
        scores = _read_scores(folder, query, images)
        if scores is None or len(scores.scores) != len(images):
            raise ValueError(
                f"{folder} does not hold scores of query {query.name!r} for these {len(images):,} images: they were "
                "changed, or the run was not finished."
            )
        results.append(scores)
    return results


def rewrite_page(folder: Path, results: Sequence[Scores], data: TrainingData, options: ReportOptions) -> Path:
    """Writes the page of a finished run once more.

    Raises:
        ValueError: The run is not complete, or is of other images.
        StorageError: The page could not be written.
    """
    manifest = read_run(folder)
    identity = manifest["identity"]
    ids = identity_hash({"of": data.images.weighted_fingerprint, "ids": list(data.images.ids)})
    if identity["training_pictures"] != ids:
        raise ValueError(f"{folder} is a run over other training images than these: they were changed since.")
    adapters = manifest.get("adapters", [])
    _write_page(folder, results=results, data=data, options=options, identity=identity, adapters=adapters)
    return folder / "report.html"
