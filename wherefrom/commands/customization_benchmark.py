"""Customized-model benchmark: retrieval of a model's exemplars among other images (AbC; AbU, section 5.2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from wherefrom.attributors.base import Attributor
from wherefrom.attributors.magnitude import by_size
from wherefrom.commands.attribute import attribute
from wherefrom.commands.customization_tasks import Task, tasks_by_kind
from wherefrom.data.encoded_images import EncodedImages, encode_image_set, joined
from wherefrom.data.image_folder import load_image
from wherefrom.data.image_set import ImageSet, joined_image_sets
from wherefrom.metrics.retrieval import MeanAveragePrecision, RecallAtK, ranked
from wherefrom.metrics.standard_error import estimate
from wherefrom.metrics.ties import first_hit
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_customized
from wherefrom.queries.sources import read_query
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.reports.query_section import ReportOptions
from wherefrom.runtime.artifacts import Store, hash_file, identity_hash, replacing, write_json
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.keyed_random import hash_text

RESULT, ROWS = "customized.json", "customized.parquet"
Words = Literal["with", "without"]
BY_SIZE = ", by size"  # of the change of a loss, whatever its sign
_WORD = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True)
class ExemplarRetrieval:
    """Retrieval of one model's exemplars from one of its generated images.

    Attributes:
        method: Name of the method.
        kind: `objects` or `styles`.
        task: Name of the model's task.
        query: Name of the generated image.
        words: Whether the prompt contains the new word.
        recall: Share of the exemplars that are among the first k.
        precision: Average precision of the exemplars in the whole ranking.
        first: Rank of the first exemplar, from 1; its mean over all orders where it ties with others.
        exemplars: Number of exemplars.
        cap: Largest recall possible with this number of exemplars.
    """

    method: str
    kind: str
    task: str
    query: str
    words: Words
    recall: float
    precision: float
    first: float
    exemplars: int
    cap: float


@dataclass(frozen=True)
class BenchmarkRow:
    """Row of the results table: means over models of each model's mean over its images, with standard errors.

    Attributes:
        method: Name of the method.
        kind: `objects` or `styles`.
        words: Whether prompts contain the new word.
        models: Number of models.
        recall: Recall@k, and its standard error (NaN for one model).
        cap: Mean of the largest recall possible.
        precision: Mean average precision, and its standard error.
    """

    method: str
    kind: str
    words: Words
    models: int
    recall: tuple[float, float]
    cap: float
    precision: tuple[float, float]


def without_new_words(prompt: str) -> str:
    """Removes new words from a prompt: "photo of <new1> cat" becomes "photo of cat"."""
    return " ".join(_WORD.sub(" ", prompt).split()).replace(" ,", ",").lstrip(", ")


def exemplar_images(task: Task, size: int, columns: Mapping[str, Any]) -> ImageSet:
    """Loads a model's exemplars, resized to the background images; ids begin with `exemplar/`.

    Args:
        task: The task.
        size: Side in pixels.
        columns: Columns of the background images, which are empty for exemplars.
    """
    pixels = np.stack([load_image(path, size) for path in task.exemplars])
    ids = tuple(f"exemplar/{task.name}/{number}" for number in range(len(task.exemplars)))
    fingerprint = identity_hash(
        {"ids": list(ids), "caption": task.caption, "files": [hash_file(path) for path in task.exemplars], "size": size}
    )
    unknown = {name: ("",) * len(ids) for name in columns}
    return ImageSet(ids, ((task.caption,),) * len(ids), pixels, unknown, fingerprint)


def add_exemplars(background: ImageSet, exemplars: ImageSet) -> ImageSet:
    """Adds the exemplars to background images, with as many captions each (an exemplar's own, repeated).

    Raises:
        ValueError: An id is in both.
    """
    count = len(background.captions[0])
    return joined_image_sets(
        background, replace(exemplars, captions=tuple(each * count for each in exemplars.captions))
    )


def find(scores: Scores, *, name: str, kind: str, task: Task, words: Words, k: int) -> ExemplarRetrieval:
    """Computes recall and average precision of the exemplars in one ranking."""
    relevant = torch.tensor([[each.startswith("exemplar/") for each in scores.ids]])
    ordered = torch.from_numpy(scores.scores)[None]
    recall, precision = RecallAtK(k), MeanAveragePrecision()
    recall.update(ordered, relevant)
    precision.update(ordered, relevant)
    first = float(first_hit(*ranked(ordered, relevant)))
    count = len(task.exemplars)
    return ExemplarRetrieval(
        name,
        kind,
        task.name,
        scores.query.name,
        words,
        float(recall.compute()["mean"]),
        float(precision.compute()["mean"]),
        int(first) if first.is_integer() else first,
        count,
        min(1.0, k / count),
    )


def benchmark(
    folder: Path,
    *,
    tasks: Sequence[Task],
    styles: Sequence[str],
    methods: Mapping[str, Attributor],
    base: str,
    base_model: DiffusionModel,
    background: TrainingData,
    store: Store,
    runner: Runner,
    words: Sequence[Words] = ("with",),
    k: int = 10,
    options: ReportOptions | None = None,
    log: Log = no_log,
) -> list[BenchmarkRow]:
    """Runs every method on every image of every model; an interrupted run is resumed.

    Curvature is the base model's, computed over the background once and used for all models, as in the papers. Methods
    whose scores are changes of a loss are also evaluated by the magnitude of the change: exemplars share the new word,
    so unlearning one can improve the loss of another.

    Args:
        folder: The run folder.
        tasks: The tasks.
        styles: Test cases that are styles; see `tasks_by_kind`.
        methods: Name -> method.
        base: Path of the base model.
        base_model: The base model.
        background: Images that the exemplars are added to, with latents by the base model's encoder.
        store: Store of the methods' artifacts.
        runner: Device and rank of this process.
        words: Prompts with the new word, without it, or both.
        k: Cutoff of Recall@k.
        options: Options of the reports of single runs; None writes none.
        log: Receives progress messages.

    Raises:
        ValueError: There is nothing to do, methods need a model that a task does not name, or see `read_customization`.
        ArtifactMismatchError: The folder holds runs with other settings.
        StorageError: The folder could not be written.
    """
    if not tasks or not methods or not words:
        raise ValueError("There is nothing to benchmark: name tasks, methods and words.")
    needy = [name for name, method in methods.items() if method.requires & {"model", "gradients"}]
    lacking = next((task.name for task in tasks if task.model is None), None)
    if needy and lacking is not None:
        raise ValueError(f"{needy[0]} needs the customized model, but the task {lacking} names none.")
    for task in tasks:
        if task.model is not None and not task.model.is_dir():
            raise ValueError(f"The task {task.name} names the model {task.model}, which is not a folder.")
    for name in needy:
        methods[name].share_curvature(base_model, background, store, runner, log)
    result: list[ExemplarRetrieval] = []
    for kind, chosen in tasks_by_kind(tasks, styles).items():
        for number, task in enumerate(chosen, start=1):
            log(f"{kind}: {task.name}, model {number} of {len(chosen)}")
            model = None
            if needy and task.model is not None:
                model = load_customized(base, task.model).to(runner.device)
            for each in words:
                data, queries = _prepare(task, background, model or base_model, store, each)
                for name, method in methods.items():
                    place = folder / f"{hash_text(task.name):016x}-{each}" / name
                    results = attribute(
                        place,
                        attributor=method,
                        data=data,
                        model=model,
                        queries=queries,
                        store=store,
                        runner=runner,
                        options=options,
                        log=log,
                    )
                    result += [find(scores, name=name, kind=kind, task=task, words=each, k=k) for scores in results]
                    if method.scores_loss_changes:
                        result += [
                            find(by_size(scores), name=f"{name}{BY_SIZE}", kind=kind, task=task, words=each, k=k)
                            for scores in results
                        ]
    lines = summarise(result)
    if runner.is_main:
        with replacing(folder / ROWS) as temporary:
            pq.write_table(pa.Table.from_pylist([asdict(each) for each in result]), temporary)
        write_json(folder / RESULT, {"k": k, "lines": [asdict(line) for line in lines]})
    runner.barrier()
    return lines


def _prepare(
    task: Task, background: TrainingData, model: DiffusionModel, store: Store, words: Words
) -> tuple[TrainingData, list[Query]]:
    height = int(background.images.pixels.shape[1])
    rewrite: Callable[[str], str] = without_new_words if words == "without" else str
    prompted = replace(task, caption=rewrite(task.caption))
    exemplars = exemplar_images(prompted, height, background.images.columns)
    images = add_exemplars(background.images, exemplars)
    latents: EncodedImages | None = None
    if background.latents is not None and model.encoder is not None:
        own = replace(exemplars, captions=images.captions[-len(exemplars) :])
        latents = joined(background.latents, encode_image_set(own, encoder=model.encoder, store=store))
    queries = [
        read_query(replace(image, prompt=rewrite(image.prompt or "")), (height, height), resize=True)
        for image in task.queries
    ]
    return TrainingData(images, latents), queries


def summarise(retrievals: Sequence[ExemplarRetrieval]) -> list[BenchmarkRow]:
    """Averages over the images of each model, then over models, which are the independent samples."""
    groups: dict[tuple[str, str, Words], dict[str, list[ExemplarRetrieval]]] = {}
    for each in retrievals:
        groups.setdefault((each.method, each.kind, each.words), {}).setdefault(each.task, []).append(each)
    lines = []
    for (method, kind, words), models in groups.items():
        recalls, precisions, caps = (
            np.array([np.mean([getattr(each, name) for each in several]) for several in models.values()])
            for name in ("recall", "precision", "cap")
        )
        lines.append(
            BenchmarkRow(method, kind, words, len(models), estimate(recalls), float(caps.mean()), estimate(precisions))
        )
    return lines


def as_table(lines: Sequence[BenchmarkRow], k: int) -> str:
    """Formats the results as a Markdown table."""
    rows = [f"| method | | V* in prompts | Recall@{k} | at most | mAP | models |", "|---" * 7 + "|"]
    for line in lines:
        recall, precision = (f"{mean:.3f} ± {error:.3f}" for mean, error in (line.recall, line.precision))
        rows.append(
            f"| {line.method} | {line.kind} | {line.words} | {recall} | {line.cap:.2f} | {precision} | {line.models} |"
        )
    return "\n".join(rows)
