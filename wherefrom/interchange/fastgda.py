"""FastGDA's files (Fast Data Attribution, arXiv 2511.10721): teacher rankings and rankers.

Its folder `data/coco` holds `influence_train.pkl`, `influence_test.pkl`, `query_train/nn_dino.pkl` and
`feats/TYPE/{data,train_query,test_query}_feats.npy`, all in the training set's order and without any ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int, Int32
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.distillation.ranker import Ranker
from wherefrom.distillation.teacher_set import Features, TeacherSet
from wherefrom.interchange.safe_pickle import read_pickle
from wherefrom.runtime.artifacts import hash_file, identity_hash, replacing

Part = Literal["train", "test"]
# Features of the rankers by input width; CLIP's image and text features have the same width.
FEATURES_BY_WIDTH = {768: ("dino",), 1280: ("dino+clip_text",)}
_BLOCK = 256  # queries that are validated at a time
_NEIGHBOURS = Path("query_train", "nn_dino.pkl")


def read_fastgda_teacher(
    folder: Path,
    part: Part = "train",
    features: Sequence[str] | None = None,
    image_set: Path | None = None,
    queries: Path | None = None,
) -> TeacherSet:
    """Reads the teacher's rankings and the features of images and queries.

    Scores are the teacher's, negated if necessary so that higher is more influential; `rank` gives the direction.

    Args:
        folder: FastGDA's `data/coco`.
        part: Training queries, each with its nearest images, or test queries, with all images.
        features: Types of features; None reads all that are present.
        image_set: A Parquet table with columns `image` and `caption`, in the order of the training set; without it,
            images are named by row and have no captions.
        queries: The same for the queries: columns `query` and `prompt`.

    Raises:
        ValueError: A key is missing, shapes do not fit, rank and influence contradict each other, an index is unknown
            or named twice, or a number is not finite.
        FileNotFoundError: A file is missing.
    """
    file = folder / f"influence_{part}.pkl"
    by_type = _features(folder / "feats", part, features)
    count = {len(both.training) for both in by_type.values()}
    if len(count) > 1:
        sizes = ", ".join(f"{name} {len(both.training)}" for name, both in by_type.items())
        raise ValueError(f"{folder / 'feats'} has features of different training sets: {sizes} images.")
    images, captions = _named(image_set, ("image", "caption"), count.pop(), "row {:06d}")
    content = read_pickle(file)
    if part == "train":
        influence, order, rank = (
            _matrix(file, content, key) for key in ("influence_subset", "rank_influence_subset", "rank")
        )
    else:
        influence, rank = (_matrix(file, content, key) for key in ("influence", "rank"))
        order = rank
    del content
    if not influence.shape == order.shape == rank.shape:
        raise ValueError(
            f"{file}: influence {influence.shape} and ranks {order.shape}, {rank.shape} must have the same shape."
        )
    rows, scores = _ordered(file, influence, order, rank, len(images))
    if part == "train" and (folder / _NEIGHBOURS).exists():
        _check_neighbours(folder / _NEIGHBOURS, rows)
    names, prompts = _named(queries, ("query", "prompt"), len(rows), f"{part} {{:04d}}")
    identity = {
        "teacher": f"FastGDA's {file.name}",
        "file": hash_file(file),
        "training_pictures": identity_hash({"ids": list(images)}),
        "queries": identity_hash({"ids": list(names)}),
        "features": sorted(by_type),
    }
    try:
        return TeacherSet(images, captions, names, prompts, rows, scores, by_type, identity)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be used: {error}") from error


def _features(folder: Path, part: Part, names: Sequence[str] | None) -> dict[str, Features]:
    """Memory-maps the features of both sides."""
    present = sorted(path.parent.name for path in folder.glob("*/data_feats.npy"))
    wanted = present if names is None else list(names)
    missing = [name for name in wanted if name not in present]
    if missing or not wanted:
        raise ValueError(
            f"{folder} has no features {missing[0] if missing else '(TYPE/data_feats.npy)'!r}; it has "
            f"{', '.join(present) or 'none'}."
        )
    return {
        name: Features(_array(folder / name / "data_feats.npy"), _array(folder / name / f"{part}_query_feats.npy"))
        for name in wanted
    }


def _array(path: Path) -> NDArray[np.float32]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an array of numbers: {error}") from error
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"{path} has shape {array.shape} and type {array.dtype}; features are (rows, width) floats.")
    return array


def _named(
    table: Path | None, columns: tuple[str, str], count: int, pattern: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Reads ids and texts of all rows, or numbers the rows without a table."""
    if table is None:
        return tuple(pattern.format(row) for row in range(count)), ("",) * count
    content = pq.read_table(table)
    missing = [name for name in columns if name not in content.column_names]
    if missing:
        raise ValueError(f"{table} has no column {missing[0]!r}; it has {', '.join(content.column_names)}.")
    if content.num_rows != count:
        raise ValueError(f"{table} has {content.num_rows} rows, but FastGDA's files have {count}: they are row by row.")
    ids, texts = ([str(value) for value in content[name].to_pylist()] for name in columns)
    return tuple(ids), tuple(texts)


def _matrix(file: Path, content: Any, key: str) -> NDArray[Any]:
    kinds = "f" if key.startswith("influence") else "iu"
    inner = content.get("random") if isinstance(content, dict) else None
    if not isinstance(inner, dict) or key not in inner:
        keys = inner if isinstance(inner, dict) else content if isinstance(content, dict) else ()
        raise ValueError(f"{file} has no entry ['random'][{key!r}]; it has {', '.join(map(repr, keys)) or 'no keys'}.")
    array = inner[key]
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in kinds or array.size == 0:
        shape = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        expected = "floats" if kinds == "f" else "whole numbers"
        raise ValueError(f"{file}: {key!r} is {shape}; it must be {expected} of shape (queries, images).")
    return array


def _ordered(
    file: Path,
    influence: Float[NDArray[Any], "q m"],
    order: Int[NDArray[Any], "q m"],
    rank: Int[NDArray[Any], "q m"],
    images: int,
) -> tuple[Int32[NDArray[np.int32], "q m"], Float[NDArray[np.float32], "q m"]]:
    """Sorts images by influence: rows, the most influential first, and scores, higher = more influential."""
    queries, width = rank.shape
    rows, scores = np.empty((queries, width), np.int32), np.empty((queries, width), np.float32)
    signs = np.zeros(queries, np.int8)
    for start in range(0, queries, _BLOCK):
        part = slice(start, start + _BLOCK)
        where = f"{file}, from query {start} on"
        if rank[part].min() < 0 or rank[part].max() >= images:
            bad = rank[part][(rank[part] < 0) | (rank[part] >= images)][0]
            raise ValueError(f"{where}: 'rank' names image {bad} of a training set of {images} images.")
        _check_permutations(file, start, order[part])
        if not np.isfinite(influence[part]).all():
            query, at = np.argwhere(~np.isfinite(influence[part]))[0]
            raise ValueError(f"{file}: query {start + query} has the influence {influence[start + query, at]}.")
        ordered = np.take_along_axis(influence[part], order[part].astype(np.int64), axis=1)
        descending, ascending = (ordered[:, 1:] <= ordered[:, :-1]).all(1), (ordered[:, 1:] >= ordered[:, :-1]).all(1)
        if not (descending | ascending).all():
            bad = start + int(np.flatnonzero(~(descending | ascending))[0])
            raise ValueError(f"{file}: the ranks of query {bad} do not follow its influence, neither up nor down.")
        signs[part] = descending.astype(np.int8) - ascending
        rows[part], scores[part] = rank[part], ordered
    if (signs > 0).any() and (signs < 0).any():
        one, other = int(np.flatnonzero(signs > 0)[0]), int(np.flatnonzero(signs < 0)[0])
        raise ValueError(f"{file}: the most influential have the highest scores in query {one}, the lowest in {other}.")
    return rows, -scores if (signs < 0).any() else scores


def _check_permutations(file: Path, start: int, order: NDArray[Any]) -> None:
    valid = (np.sort(order, axis=1) == np.arange(order.shape[1])).all(axis=1)
    if not valid.all():
        bad = int(np.flatnonzero(~valid)[0])
        values, counts = np.unique(order[bad], return_counts=True)
        twice = f" {values[counts > 1][0]} is named twice." if (counts > 1).any() else ""
        raise ValueError(
            f"{file}: the ranks of query {start + bad} must name each of 0 to {order.shape[1] - 1} once.{twice}"
        )


def _check_neighbours(file: Path, rows: Int32[NDArray[np.int32], "q m"]) -> None:
    """Checks that the scored images are DINO neighbours; otherwise the files belong to other queries."""
    content = read_pickle(file)
    try:
        near = content["fixed"]["rank"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} has no entry ['fixed']['rank'].") from error
    if len(near) != len(rows):
        raise ValueError(f"{file} has neighbours of {len(near)} queries, but {len(rows)} are ranked.")
    for query, (neighbours, ranked) in enumerate(zip(near, rows, strict=True)):
        unknown = ranked[~np.isin(ranked, np.asarray(neighbours))]
        if len(unknown):
            raise ValueError(f"{file}: image {unknown[0]}, which query {query} ranks, is not among its neighbours.")


def read_fastgda_ranker(path: Path, dropout: float = 0.1) -> Ranker:
    """Reads a ranker of FastGDA: a state dict, loaded with `weights_only=True`.

    Args:
        path: The `.pth` file.
        dropout: Dropout rate of its training, which the file does not record.

    Raises:
        ValueError: The file holds anything but tensors, lacks one, or has one too many or of another shape.
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no ranker {path}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and hostile files raise anything
        raise ValueError(f"{path} is not a state dict of tensors: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a state dict of tensors by name.")
    first, last = ("mlp.layers.0.weight", "mlp.output_layer.weight")
    hidden = sum(name.startswith("mlp.layers.") and name.endswith(".weight") for name in state)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in (last, *([first] if hidden else [])):
        if len(shapes.get(name, ())) != 2:
            raise ValueError(f"{path} has no matrix {name!r}; it has {', '.join(state) or 'nothing'}.")
    width = shapes[first][0] if hidden else 1
    inputs = shapes[first if hidden else last][1]
    ranker = Ranker(inputs, width=width, hidden=hidden, outputs=shapes[last][0], dropout=dropout)
    expected = {name: tuple(tensor.shape) for name, tensor in ranker.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise ValueError(
                f"{path}: {name!r} has shape {shapes.get(name, '(missing)')}, a ranker of {hidden} hidden layers and "
                f"{inputs} inputs has {expected.get(name, 'no such tensor')}."
            )
        if not bool(torch.isfinite(state[name]).all()):
            raise ValueError(f"{path}: {name!r} holds a number that is not finite.")
    ranker.load_state_dict(state)
    return ranker.eval()


def write_fastgda_ranker(path: Path, ranker: Ranker) -> None:
    """Writes a ranker in FastGDA's format: a state dict with the same names.

    Raises:
        StorageError: The file could not be written.
    """
    with replacing(path) as temporary:
        torch.save({name: tensor.detach().cpu() for name, tensor in ranker.state_dict().items()}, temporary)


def features_of_width(width: int) -> tuple[str, ...]:
    """Infers the input features of a FastGDA ranker from its input width.

    Raises:
        ValueError: The width is ambiguous.
    """
    if width not in FEATURES_BY_WIDTH:
        raise ValueError(f"A ranker of {width} inputs may take several features: name them with --features.")
    return FEATURES_BY_WIDTH[width]
