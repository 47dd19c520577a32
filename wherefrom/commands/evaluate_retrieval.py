"""Retrieval evaluation: mAP(k) and Recall@k of a method's rankings against a teacher's top k.

Fast Data Attribution, section 4.1: the teacher's k highest are the relevant images. mAP(k) is the mean over queries of
the average precision of the method's ranking of the whole set, Recall@k the share of the k that are among the method's
first k. The ceiling is the teacher itself, run again with other noise or on a model of another seed: no method can be
expected to agree with a teacher better than the teacher does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from wherefrom.commands.complete_rankings import CompleteRankings, check_comparable, read_complete_rankings
from wherefrom.metrics.retrieval import Cutoff, QueryMean
from wherefrom.metrics.ties import average_precision, recall
from wherefrom.runtime.artifacts import write_json

RESULT, CEILING = "retrieval.json", "ceiling"
# 500, 1000 and 4000 of MSCOCO's 118,287 images, as the papers have it, and ten.
DEPTHS = (0.0042, 0.0085, 0.034, 10)


@dataclass(frozen=True)
class RetrievalScore:
    """One retrieval metric of one method.

    Attributes:
        method: Name of the method.
        metric: `mAP` or `Recall`.
        k: Cutoff of the metric.
        mean: Mean over queries.
        error: Its standard error; None for a single query.
        count: Number of queries.
    """

    method: str
    metric: str
    k: Cutoff
    mean: float
    error: float | None
    count: int


def retrieval_scores(
    name: str, teacher: CompleteRankings, other: CompleteRankings, cutoffs: Sequence[Cutoff]
) -> list[RetrievalScore]:
    """Computes retrieval metrics of rankings against a teacher's, for all of the teacher's queries.

    Recall@1 (whether both rank the same image first) is always included. Images that the method scores alike are taken
    in all orders (`metrics.ties`); a tie at the edge of the teacher's first k is broken by id, on its side only.

    Raises:
        ValueError: The teacher gives all images of a query the same score: it has no first k.
    """
    recalls = cutoffs if any(cutoff.number == 1 for cutoff in cutoffs) else [Cutoff(1), *cutoffs]
    wanted = [("mAP", cutoff) for cutoff in cutoffs] + [("Recall", cutoff) for cutoff in recalls]
    values: list[list[float]] = [[] for _ in wanted]
    for query, order in teacher.orders.items():
        if query in teacher.tied and len(order) > 1 and teacher.tied[query][1:].all():
            raise ValueError(
                f"{teacher.folder} gives all {len(order)} images the same score for query {query!r}: which are its "
                "first is not defined. Measure against a teacher without this query."
            )
        ranks = np.empty(len(order), np.int32)
        ranks[order] = np.arange(len(order), dtype=np.int32)
        teacher_ranks = ranks[other.orders[query]]  # in the order of the method
        for kept, (metric, cutoff) in zip(values, wanted, strict=True):
            if query in other.tied:
                hits, tied = (
                    torch.from_numpy(each)[None] for each in (teacher_ranks < cutoff.number, other.tied[query])
                )
                mean = average_precision(hits, tied) if metric == "mAP" else recall(hits, tied, cutoff.number)
                kept.append(float(mean))
                continue
            places = np.flatnonzero(teacher_ranks < cutoff.number)
            precision = np.arange(1, cutoff.number + 1) / (places + 1)
            kept.append(float(precision.mean() if metric == "mAP" else (places < cutoff.number).mean()))
    return [_mean_score(name, metric, cutoff, kept) for (metric, cutoff), kept in zip(wanted, values, strict=True)]


def _mean_score(name: str, metric: str, cutoff: Cutoff, values: Sequence[float]) -> RetrievalScore:
    mean = QueryMean()
    mean.update(torch.tensor(values, dtype=torch.float64))
    computed = {key: value.item() for key, value in mean.compute().items()}
    error = None if math.isnan(computed["error"]) else computed["error"]
    return RetrievalScore(name, metric, cutoff, computed["mean"], error, int(computed["count"]))


def named_folders(pairs: Sequence[str]) -> dict[str, Path]:
    """Parses run folders from `name=folder`.

    Raises:
        ValueError: A pair has no name or folder, or a name is used twice or reserved for the ceiling.
    """
    folders: dict[str, Path] = {}
    for pair in pairs:
        name, sign, folder = pair.partition("=")
        if not (name and sign and folder):
            raise ValueError(f"rankings: {pair!r} is not name=folder.")
        if name in folders or name == CEILING:
            raise ValueError(f"rankings: {name!r} is {'used twice' if name in folders else 'the name of the ceiling'}.")
        folders[name] = Path(folder)
    return folders


def retrieval(
    folder: Path,
    teacher: Path,
    methods: Mapping[str, Path],
    ceiling: Path | None = None,
    depths: Sequence[float] = DEPTHS,
) -> list[RetrievalScore]:
    """Evaluates methods against a teacher and writes `retrieval.json`.

    Args:
        folder: Output folder of `retrieval.json`.
        teacher: A run folder of `attribute`, or a teacher set of the whole training set.
        methods: Name -> run folder or teacher set.
        ceiling: A second run of the teacher, with other noise or another model seed.
        depths: Cutoffs: numbers of images, or shares of the training set.

    Raises:
        ValueError: There is nothing to evaluate, rankings are incomplete, or they cannot be compared.
        FileNotFoundError: A folder holds no rankings.
        StorageError: The result could not be written.
    """
    if not methods and ceiling is None:
        raise ValueError("There is nothing to compare with the teacher: name rankings, methods or a ceiling.")
    if not depths:
        raise ValueError("There is no k: name shares of the training set or numbers of images.")
    truth = read_complete_rankings(teacher)
    chosen = [Cutoff.of(k, len(truth.images)) for k in depths]
    rows: list[RetrievalScore] = []
    for name, place in [*methods.items(), *([(CEILING, ceiling)] if ceiling is not None else [])]:
        rankings = read_complete_rankings(place)
        check_comparable(truth, rankings, same_model=name != CEILING)
        rows += retrieval_scores(name, truth, rankings, chosen)
    write_json(
        folder / RESULT,
        {
            "teacher": str(teacher),
            "rankings": {name: str(place) for name, place in methods.items()},
            "ceiling": None if ceiling is None else str(ceiling),
            "pictures": len(truth.images),
            "queries": list(truth.orders),
            "rows": [asdict(row) for row in rows],
        },
    )
    return rows


def as_table(rows: Sequence[RetrievalScore]) -> str:
    """Formats the scores as a Markdown table."""
    columns = list(dict.fromkeys((row.metric, row.k) for row in rows))
    titles = [f"mAP({k})" if metric == "mAP" else f"Recall@{k}" for metric, k in columns]
    lines = ["| ranking | " + " | ".join(titles) + " | n |", "|---" * (len(columns) + 2) + "|"]
    cells = {(row.method, row.metric, row.k): row for row in rows}
    for method in dict.fromkeys(row.method for row in rows):
        scores = [cells[method, *column] for column in columns]
        numbers = [f"{row.mean:.3f} ± {'–' if row.error is None else f'{row.error:.3f}'}" for row in scores]
        lines.append(f"| {method} | " + " | ".join(numbers) + f" | {scores[0].count} |")
    return "\n".join(lines)
