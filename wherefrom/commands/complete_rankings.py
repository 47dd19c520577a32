"""Complete rankings of a training set, read from a run folder of `attribute` or from a teacher set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int32
from numpy.typing import NDArray

from wherefrom.commands.attribute import read_run
from wherefrom.distillation.teacher_set import TRAINING, read_teacher_set
from wherefrom.rankings.ranking_file import RANKING

_SHOWN = 3


@dataclass(frozen=True)
class CompleteRankings:
    """Rankings of all training images for some queries.

    Attributes:
        folder: Folder they were read from.
        images: Ids of the training images, sorted: equal for rankings of the same images.
        orders: Query -> positions in `images`, the most influential first; ties by id.
        prompts: Query -> prompt.
        model: Fingerprint of the attributed model, if known.
        training_images: Identity of the training set, if known; comparable between run folders only.
        tied: Query -> whether each place's score is that of the place before; only of queries with ties.
    """

    folder: Path
    images: tuple[str, ...]
    orders: Mapping[str, Int32[NDArray[np.int32], " n"]]
    prompts: Mapping[str, str]
    model: str | None
    training_images: str | None
    tied: Mapping[str, Bool[NDArray[np.bool_], " n"]] = field(default_factory=dict)


def read_complete_rankings(folder: Path) -> CompleteRankings:
    """Reads complete rankings.

    Raises:
        ValueError: The run is not complete, or its rankings are truncated or damaged.
        FileNotFoundError: The folder holds neither a run nor a teacher set.
    """
    return _of_teacher_set(folder) if (folder / TRAINING).exists() else _of_run(folder)


def _of_teacher_set(folder: Path) -> CompleteRankings:
    teacher = read_teacher_set(folder, features=())
    if not teacher.is_complete:
        raise ValueError(
            f"{folder} ranks {teacher.rows.shape[1]} of {len(teacher.images)} training images: retrieval is measured "
            "against rankings of the whole set. Score all of them for these queries."
        )
    order = np.argsort(np.array(teacher.images))
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    ties = {query: _ties(scores) for query, scores in zip(teacher.queries, teacher.scores, strict=True)}
    return CompleteRankings(
        folder,
        tuple(teacher.images[index] for index in order),
        {query: place[rows] for query, rows in zip(teacher.queries, teacher.rows, strict=True)},
        dict(zip(teacher.queries, teacher.prompts, strict=True)),
        _text(teacher.identity.get("model")),
        None,
        {query: tied for query, tied in ties.items() if tied.any()},
    )


def _ties(scores: Float[NDArray[np.floating], " n"]) -> Bool[NDArray[np.bool_], " n"]:
    return np.append(False, scores[1:] == scores[:-1])


def _of_run(folder: Path) -> CompleteRankings:
    manifest = read_run(folder)
    if manifest.get("cut") is not None:
        raise ValueError(
            f"{folder} is truncated: it keeps only the first {manifest['cut']} images of each query, and retrieval "
            "needs rankings of the whole set. Attribute without a cut."
        )
    identity: Mapping[str, Any] = manifest["identity"]
    images, orders, tied = _orders(folder / RANKING)
    prompts = {entry[0]: entry[1] for entry in identity.get("queries", [])}
    return CompleteRankings(
        folder, images, orders, prompts, _text(identity.get("model")), _text(identity.get("training_pictures")), tied
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _orders(
    path: Path,
) -> tuple[tuple[str, ...], dict[str, Int32[NDArray[np.int32], " n"]], dict[str, Bool[NDArray[np.bool_], " n"]]]:
    """Reads a ranking file with names as dictionary codes: a thousand queries of COCO are 118 million rows."""
    names = ["query", "rank", "image"]
    try:
        table = pq.read_table(path, columns=[*names, "score"], read_dictionary=["query", "image"])
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Attribute again.") from error
    missing = [name for name in names if name not in table.column_names]
    if missing or table.num_rows == 0 or any(table[name].null_count for name in table.column_names):
        what = f"no column {missing[0]!r}" if missing else "no rows, or empty cells"
        raise ValueError(f"{path} has {what}: it is not a ranking.")
    table = table.unify_dictionaries().combine_chunks()
    queries, images = (_coded(table[name]) for name in ("query", "image"))
    order = np.argsort(np.array(images[1]))
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    positions, ranks = place[images[0]], table["rank"].to_numpy()
    starts = np.flatnonzero(np.diff(queries[0], prepend=-1))
    scores = table["score"].to_numpy() if "score" in table.column_names else None
    orders: dict[str, NDArray[np.int32]] = {}
    ties: dict[str, NDArray[np.bool_]] = {}
    for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True):
        query, order_of_query = queries[1][queries[0][start]], positions[start:stop]
        if query in orders or not np.array_equal(ranks[start:stop], np.arange(1, stop - start + 1)):
            raise ValueError(f"{path} is not sorted by query and rank, from 1 on, at query {query!r}. Attribute again.")
        named = np.bincount(order_of_query, minlength=len(order))
        if not (named == 1).all():
            wrong = images[1][order[int(np.flatnonzero(named != 1)[0])]]
            how = "twice" if named[named != 1][0] else "not at all"
            raise ValueError(
                f"{path} ranks {wrong!r} {how} for query {query!r}, though other queries or places name it: retrieval "
                "needs rankings of the whole set, each image once."
            )
        orders[query] = order_of_query
        if scores is not None and (tied := _ties(scores[start:stop])).any():
            ties[query] = tied
    return tuple(images[1][index] for index in order), orders, ties


def _coded(column: pa.ChunkedArray) -> tuple[NDArray[np.int32], list[str]]:
    array = column.chunk(0)
    return array.indices.to_numpy(), array.dictionary.to_pylist()


def check_comparable(teacher: CompleteRankings, other: CompleteRankings, same_model: bool = True) -> None:
    """Raises if rankings differ in images, queries or model.

    Args:
        teacher: Rankings that define the queries.
        other: Rankings that must cover these queries; they may cover more.
        same_model: Whether both must attribute the same model, if they attribute one.

    Raises:
        ValueError: They cannot be compared; names the difference.
    """
    both = f"{other.folder} and the teacher {teacher.folder}"
    if teacher.images != other.images:
        only = sorted(set(teacher.images) ^ set(other.images))
        raise ValueError(
            f"{both} rank other training images: {len(other.images)} and {len(teacher.images)}; only one of them "
            f"has {_some(only)}."
        )
    missing = [query for query in teacher.orders if query not in other.orders]
    if missing:
        raise ValueError(
            f"{other.folder} does not rank {len(missing)} of the {len(teacher.orders)} queries of the teacher "
            f"{teacher.folder}: {_some(missing)}; it has {_some(list(other.orders))}. Attribute the same queries."
        )
    for query in teacher.orders:
        prompts = teacher.prompts.get(query, ""), other.prompts.get(query, "")
        if all(prompts) and prompts[0] != prompts[1]:
            raise ValueError(
                f"{both} have different queries named {query!r}: the prompts are {prompts[1]!r} and {prompts[0]!r}."
            )
    compared = [("training images", teacher.training_images, other.training_images)]
    compared += [("models", teacher.model, other.model)] if same_model else []
    for what, theirs, ours in compared:
        if theirs is not None and ours is not None and theirs != ours:
            raise ValueError(f"{both} are of other {what}: {ours} and {theirs}.")


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")
