"""One attribution run: queries in, a run folder with ranking, manifest, pictures and report out."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from wherefrom.attributors.base import Attributor, Query, Say, Scores, TrainingData, silent
from wherefrom.data.pictures import Pictures
from wherefrom.diffusion import DiffusionModel
from wherefrom.evaluation.null import p_values, standing_out
from wherefrom.evaluation.ranking import order_of, write_ranking
from wherefrom.evaluation.shares import group_shares
from wherefrom.report import QueryReport, RankedPicture, write_report
from wherefrom.runner import Runner
from wherefrom.storage import MANIFEST, Store, check_identity, identity_hash, read_manifest, replacing, write_manifest

_NOTHING = 0.05  # family-wise p-value above which the report says that nothing stands out
_MOST_GROUPS = 50


@dataclass(frozen=True)
class ReportOptions:
    """What the page shows.

    Attributes:
        top: Training pictures shown for each query, and counted in the shares of groups.
        groups: Columns of the data set whose shares are shown; None takes all with 2 to 50 values.
        title: Title of the page.
    """

    top: int = 20
    groups: list[str] | None = None
    title: str = "Where did these pictures come from?"

    def columns(self, pictures: Pictures) -> list[str]:
        """The group columns.

        Raises:
            ValueError: A column is not in the data set.
        """
        if self.groups is None:
            skipped = {"split", "concept", "name"}
            most = min(_MOST_GROUPS, len(pictures) - 1)  # a column that tells every picture apart groups nothing
            return [
                name
                for name, values in pictures.columns.items()
                if name not in skipped and 2 <= len(set(values)) <= most
            ]
        missing = [name for name in self.groups if name not in pictures.columns]
        if missing:
            raise ValueError(f"The data set has no column {missing[0]!r}; it has {', '.join(pictures.columns)}.")
        return self.groups


def run_identity(
    attributor: Attributor, data: TrainingData, model: DiffusionModel | None, queries: Sequence[Query]
) -> dict[str, Any]:
    """What must match for a run folder to be gone on with."""
    return {
        "attributor": attributor.identity(),
        "model": None if model is None else model.fingerprint(),
        "training_pictures": identity_hash({"of": data.pictures.fingerprint, "ids": list(data.pictures.ids)}),
        "latents": None if data.latents is None else data.latents.fingerprint,
        "held_out": None
        if data.held_out is None
        else identity_hash({"of": data.held_out.fingerprint, "ids": list(data.held_out.ids)}),
        "queries": [_query_identity(query) for query in queries],
    }


def _query_identity(query: Query) -> list[str]:
    """Name and prompt, and where only a part is asked for, which."""
    part = [] if query.region is None else [hashlib.blake2b(query.region.mask.tobytes()).hexdigest()]
    return [query.name, query.prompt, *part]


def attribute(
    folder: Path,
    attributor: Attributor,
    data: TrainingData,
    model: DiffusionModel | None,
    queries: Sequence[Query],
    store: Store,
    runner: Runner,
    options: ReportOptions = ReportOptions(),
    say: Say = silent,
) -> list[Scores]:
    """Attributes the queries and leaves ranking, manifest, pictures and report in the folder.

    Queries that an interrupted run has finished are not scored again.

    Args:
        folder: The run folder.
        attributor: The method.
        data: Training pictures and the null.
        model: The model, for methods that require one.
        queries: The queries.
        store: Where the method keeps what it makes.
        runner: This process's place.
        options: What the page shows.
        say: Is told what is being done.

    Raises:
        ArtifactMismatchError: The folder holds a run with other settings.
        StorageError: The folder could not be written; finished queries are kept.
        ValueError: Two queries have the same name, or the method cannot attribute one; see the attributor.
    """
    options.columns(data.pictures)
    names = [query.name for query in queries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two queries are called {twice[0]!r}: give each its own id, results are told apart by it.")
    attributor.check(queries)
    identity = run_identity(attributor, data, model, queries)
    if (folder / MANIFEST).exists():
        check_identity(folder, identity)
    elif runner.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, identity, complete=False)
    finished = {
        query.name: scores for query in queries if (scores := _read_scores(folder, query, data.pictures)) is not None
    }
    if len(finished) < len(queries):
        if finished:
            say(f"{len(finished)} of {len(queries)} queries are already done in {folder}")
        attributor.fit(data, model, store, runner, say)
        started = time.monotonic()
        for found in attributor.score([query for query in queries if query.name not in finished]):
            scores = replace(found, facts={**found.facts, "seconds": time.monotonic() - started})
            started = time.monotonic()
            finished[scores.query.name] = scores
            if runner.is_main:
                _write_scores(folder, scores)
            part = "" if scores.query.region is None else f", {scores.query.region.name}"
            say(f"query {len(finished)} of {len(queries)} is done: {scores.query.prompt!r}{part}")
    results = [finished[query.name] for query in queries]
    if runner.is_main:
        _write_results(folder, results, data, options, identity, attributor)
    runner.barrier()
    return results


def _scores_file(folder: Path, query: Query) -> Path:
    return folder / "scores" / f"{identity_hash({'query': query.name})}.safetensors"


def _write_scores(folder: Path, scores: Scores) -> None:
    facts = json.dumps({name: value for name, value in scores.facts.items() if math.isfinite(value)})
    with replacing(_scores_file(folder, scores.query)) as temporary:
        save_file({"scores": scores.scores, "null": scores.null}, temporary, {"facts": facts})


def _read_scores(folder: Path, query: Query, pictures: Pictures) -> Scores | None:
    path = _scores_file(folder, query)
    if not path.exists():
        return None
    from safetensors import safe_open

    with safe_open(path, "np") as stream:
        facts: dict[str, float] = json.loads(stream.metadata()["facts"])
    arrays = load_file(path)
    return Scores(query, pictures.ids, arrays["scores"], arrays["null"], facts)


def _write_results(
    folder: Path,
    results: Sequence[Scores],
    data: TrainingData,
    options: ReportOptions,
    identity: Mapping[str, Any],
    attributor: Attributor,
) -> None:
    rankings = {scores.query.name: (scores.ids, scores.scores) for scores in results}
    with_null = all(len(scores.null) for scores in results)
    tail = {scores.query.name: p_values(scores.scores, scores.null) for scores in results} if with_null else None
    write_ranking(folder, rankings, tail)
    for scores in results:
        with replacing(folder / "queries" / f"{_scores_file(folder, scores.query).stem}.png") as temporary:
            Image.fromarray(scores.query.pixels).save(temporary, "PNG")
    pages = [_page(scores, data, options) for scores in results]
    method = str(attributor.identity()["method"])
    write_report(
        folder / "report.html",
        options.title,
        pages,
        {
            "Method": method,
            "Model": str(identity["model"]),
            "Training pictures": f"{len(data.pictures):,}",
            "Pictures never trained on (the null)": f"{0 if data.held_out is None else len(data.held_out):,}",
        },
        methods_note="Shares of groups are of the influence above the median among the pictures shown; "
        "intervals are 95 % bootstrap.",
    )
    write_manifest(
        folder,
        identity,
        complete=True,
        cut=None,
        facts={scores.query.name: {k: v for k, v in scores.facts.items() if math.isfinite(v)} for scores in results},
    )


def _page(scores: Scores, data: TrainingData, options: ReportOptions) -> QueryReport:
    pictures = data.pictures
    order = order_of(scores.ids, scores.scores)
    where = {name: index for index, name in enumerate(pictures.ids)}
    tail = p_values(scores.scores, scores.null) if len(scores.null) else None
    columns = options.columns(pictures)
    ranked = []
    for rank, position in enumerate(order[: options.top], start=1):
        index = where[scores.ids[position]]
        ranked.append(
            RankedPicture(
                id=pictures.ids[index],
                rank=rank,
                score=float(scores.scores[position]),
                p_value=None if tail is None else float(tail[position]),
                pixels=np.asarray(pictures.pixels[index]),
                caption=pictures.captions[index][0],
                license=pictures.columns.get("license", ("unknown",) * len(pictures))[index],
                groups={column: pictures.columns[column][index] for column in columns},
            )
        )
    facts, notes = _facts(scores)
    shares = {}
    top = min(options.top, len(order))
    if scores.scores[order[:top]].max() > np.median(scores.scores):
        positions = [where[name] for name in scores.ids]
        shares = {
            column: group_shares(scores.scores, [pictures.columns[column][p] for p in positions], top)
            for column in columns
        }
    else:
        notes.append("No picture scores above the median: there is no influence to divide between groups.")
    query = scores.query
    pixels = query.pixels if query.region is None else query.region.show(query.pixels)
    return QueryReport(query.name, query.prompt, pixels, ranked, shares, facts, notes)


def _facts(scores: Scores) -> tuple[dict[str, str], list[str]]:
    facts, notes = {}, []
    if scores.query.region is not None:
        facts["Region"] = f"{scores.query.region.name}; the rest is shown faded"
    reliability = scores.facts.get("split_half_reliability")
    if reliability is not None:
        facts["Split-half reliability"] = f"{reliability:.3f}"
        if reliability < 0.8:
            notes.append(
                f"The ranking is noisy: its split-half reliability is {reliability:.2f}. Measure more timesteps "
                "or draws."
            )
    if "query_loss_rise" in scores.facts:
        facts["Rise of the query's loss"] = f"{scores.facts['query_loss_rise']:.1%}"
    for name, label in (("unlearning_s", "Unlearning"), ("losses_s", "Losses after it")):
        if name in scores.facts:
            facts[label] = f"{scores.facts[name]:.1f} s"
    if not scores.query.prompt:
        notes.append(
            "The prompt is not known: the empty prompt was used, so what only the words brought in cannot be found."
        )
    if len(scores.null) >= 10:
        family = standing_out(scores.scores, scores.null)
        facts["Family-wise p of the first"] = f"{family:.2g}"
        if family > _NOTHING:
            notes.append(
                "Nothing stands out: no training picture scores higher than pictures never trained on would by chance."
            )
    return facts, notes


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
