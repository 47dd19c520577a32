"""Does a fast method find what a teacher ranks highest? mAP(k) and Recall@k over the whole training set.

Fast Data Attribution, section 4.1: the teacher's k highest are what is relevant. mAP(k) is the mean over queries of
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

from wherefrom.commands.complete_rankings import WholeRankings, check_alike, read_whole_rankings
from wherefrom.metrics.retrieval import Depth, QueryMean
from wherefrom.runtime.artifacts import write_json

RESULT, CEILING = "retrieval.json", "ceiling"
# 500, 1000 and 4000 of MSCOCO's 118,287 images, as the papers have it, and ten.
DEPTHS = (0.0042, 0.0085, 0.034, 10)


@dataclass(frozen=True)
class Agreement:
    """One number of the table.

    Attributes:
        method: Whose ranking.
        metric: `mAP` or `Recall`.
        k: At which depth.
        mean: Mean over queries.
        error: Its standard error; None for a single query.
        count: Queries.
    """

    method: str
    metric: str
    k: Depth
    mean: float
    error: float | None
    count: int


def agreements(name: str, teacher: WholeRankings, other: WholeRankings, depths: Sequence[Depth]) -> list[Agreement]:
    """How far rankings agree with a teacher's, for all of the teacher's queries.

    Recall@1, whether both name the same image first, is always among them.
    """
    recalls = depths if any(depth.number == 1 for depth in depths) else [Depth(1), *depths]
    wanted = [("mAP", depth) for depth in depths] + [("Recall", depth) for depth in recalls]
    values: list[list[float]] = [[] for _ in wanted]
    for query, order in teacher.orders.items():
        ranks = np.empty(len(order), np.int32)
        ranks[order] = np.arange(len(order), dtype=np.int32)
        result = ranks[other.orders[query]]  # the teacher's ranks in the order of the method
        for kept, (metric, depth) in zip(values, wanted, strict=True):
            places = np.flatnonzero(result < depth.number)
            precision = np.arange(1, depth.number + 1) / (places + 1)
            kept.append(float(precision.mean() if metric == "mAP" else (places < depth.number).mean()))
    return [_agreement(name, metric, depth, kept) for (metric, depth), kept in zip(wanted, values, strict=True)]


def _agreement(name: str, metric: str, depth: Depth, values: Sequence[float]) -> Agreement:
    mean = QueryMean()
    mean.update(torch.tensor(values, dtype=torch.float64))
    result = {key: value.item() for key, value in mean.compute().items()}
    error = None if math.isnan(result["error"]) else result["error"]
    return Agreement(name, metric, depth, result["mean"], error, int(result["count"]))


def named_folders(pairs: Sequence[str]) -> dict[str, Path]:
    """Run folders from `name=folder`.

    Raises:
        ValueError: A pair has no name or folder, or a name is used twice or stands for the ceiling.
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
) -> list[Agreement]:
    """Measures methods against a teacher and leaves `retrieval.json`.

    Args:
        folder: Where `retrieval.json` goes.
        teacher: A run folder of `evaluate.py attribute`, or a teacher set of the whole training set.
        methods: Name -> run folder or teacher set.
        ceiling: The same teacher once more, with other noise or another model seed.
        depths: Numbers of images, or shares of the training set.

    Raises:
        ValueError: There is nothing to measure, rankings are not whole, or they do not belong together.
        FileNotFoundError: A folder holds no rankings.
        StorageError: The result could not be written.
    """
    if not methods and ceiling is None:
        raise ValueError("There is nothing to compare with the teacher: name rankings, methods or a ceiling.")
    if not depths:
        raise ValueError("There is no k: name shares of the training set or numbers of images.")
    truth = read_whole_rankings(teacher)
    chosen = [Depth.of(k, len(truth.images)) for k in depths]
    rows: list[Agreement] = []
    for name, place in [*methods.items(), *([(CEILING, ceiling)] if ceiling is not None else [])]:
        result = read_whole_rankings(place)
        check_alike(truth, result, same_model=name != CEILING)
        rows += agreements(name, truth, result, chosen)
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


def as_table(rows: Sequence[Agreement]) -> str:
    """The table in Markdown."""
    columns = list(dict.fromkeys((row.metric, row.k) for row in rows))
    titles = [f"mAP({k})" if metric == "mAP" else f"Recall@{k}" for metric, k in columns]
    lines = ["| ranking | " + " | ".join(titles) + " | n |", "|---" * (len(columns) + 2) + "|"]
    cells = {(row.method, row.metric, row.k): row for row in rows}
    for method in dict.fromkeys(row.method for row in rows):
        result = [cells[method, *column] for column in columns]
        numbers = [f"{row.mean:.3f} ± {'–' if row.error is None else f'{row.error:.3f}'}" for row in result]
        lines.append(f"| {method} | " + " | ".join(numbers) + f" | {result[0].count} |")
    return "\n".join(lines)
