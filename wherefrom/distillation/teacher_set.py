"""Teacher sets: rankings of training images by an expensive method for many queries, with features of both.

Training data of a ranker (Fast Data Attribution, section 4). On disk a set is a folder:

- `manifest.json`: identity of the teacher and of the training set;
- `training.parquet`: `image`, `caption` (the first) of every training image;
- `queries.parquet`: one row per query: `query`, `prompt`, and lists of equal length `images` (rows of
  `training.parquet`, the most influential first) and `scores` (the teacher's);
- `features/NAME.training.npy` and `features/NAME.queries.npy`: float32, rows as in the two tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int32
from numpy.typing import NDArray

from wherefrom.runtime.artifacts import read_manifest, replacing, write_manifest
from wherefrom.runtime.checked_files import read_array

TRAINING, QUERIES, FEATURES = "training.parquet", "queries.parquet", "features"


@dataclass(frozen=True)
class Features:
    """Features of training images and of queries by one encoder.

    Attributes:
        training: One row per training image.
        queries: One row per query.
    """

    training: Float[NDArray[np.float32], "n d"]
    queries: Float[NDArray[np.float32], "q d"]


@dataclass(frozen=True)
class TeacherSet:
    """Rankings of training images by a teacher for some queries.

    Attributes:
        images: Ids of the training images.
        captions: First caption of each training image.
        queries: Ids of the queries.
        prompts: Prompts of the queries.
        rows: Positions in `images` of the images that the teacher scored, the most influential first.
        scores: The teacher's scores of these images.
        features: Name of encoder -> features.
        identity: Identity of the teacher and of the training set.

    Raises:
        ValueError: Shapes do not fit, no image was scored, an id is named twice, a row is unknown or named twice, or
            a score or feature is not finite.
    """

    images: tuple[str, ...]
    captions: tuple[str, ...]
    queries: tuple[str, ...]
    prompts: tuple[str, ...]
    rows: Int32[NDArray[np.int32], "q m"]
    scores: Float[NDArray[np.float32], "q m"]
    features: Mapping[str, Features]
    identity: Mapping[str, Any]

    def __post_init__(self) -> None:
        for what, ids in (("training images", self.images), ("queries", self.queries)):
            if len(set(ids)) < len(ids):
                raise ValueError(f"The ids of the {what} are not unique: {_repeated(ids)!r} occurs twice.")
        if len(self.captions) != len(self.images) or len(self.prompts) != len(self.queries):
            raise ValueError(
                f"{len(self.images)} training images have {len(self.captions)} captions, and {len(self.queries)} "
                f"queries {len(self.prompts)} prompts: there must be one each."
            )
        if self.rows.shape != self.scores.shape or self.rows.ndim != 2 or len(self.rows) != len(self.queries):
            raise ValueError(
                f"Rows {self.rows.shape} and scores {self.scores.shape} must be (queries, scored images) of "
                f"{len(self.queries)} queries."
            )
        if self.rows.size == 0:
            raise ValueError("No image was scored for any query: the candidates are empty.")
        for query, rows, scores in zip(self.queries, self.rows, self.scores, strict=True):
            self._check_query(query, rows, scores)
        for name, both in self.features.items():
            for what, matrix, count in (("training", both.training, len(self.images)), ("queries", both.queries, None)):
                expected = len(self.queries) if count is None else count
                if matrix.ndim != 2 or len(matrix) != expected:
                    raise ValueError(f"Features {name!r} of {what} have shape {matrix.shape}; {expected} rows needed.")
                _check_finite(matrix, f"features {name!r} of {what}")
            if both.training.shape[1] != both.queries.shape[1]:
                raise ValueError(
                    f"Features {name!r} have {both.training.shape[1]} numbers for training images and "
                    f"{both.queries.shape[1]} for queries: they do not belong together."
                )

    def _check_query(self, query: str, rows: NDArray[np.int32], scores: NDArray[np.float32]) -> None:
        if rows.min() < 0 or rows.max() >= len(self.images):
            bad = rows[(rows < 0) | (rows >= len(self.images))][0]
            raise ValueError(f"Query {query!r} ranks image {bad} of a training set of {len(self.images)} images.")
        if len(np.unique(rows)) < len(rows):
            values, counts = np.unique(rows, return_counts=True)
            raise ValueError(f"Query {query!r} ranks {self.images[values[counts > 1][0]]!r} twice.")
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(f"Query {query!r}: the score of {self.images[rows[bad]]!r} is {scores[bad]}.")

    @property
    def is_complete(self) -> bool:
        """Whether every query's ranking covers the whole training set."""
        return bool(self.rows.shape[1] == len(self.images))

    def by_image(self) -> Float[NDArray[np.float64], "q n"]:
        """Arranges the scores in the order of the training images; NaN where an image was not scored."""
        table = np.full((len(self.queries), len(self.images)), np.nan)
        np.put_along_axis(table, self.rows.astype(np.int64), self.scores.astype(np.float64), axis=1)
        return table

    def of_queries(self, positions: Sequence[int]) -> TeacherSet:
        """Selects some queries."""
        chosen = np.asarray(positions, dtype=np.int64)
        return replace(
            self,
            queries=tuple(self.queries[index] for index in chosen),
            prompts=tuple(self.prompts[index] for index in chosen),
            rows=self.rows[chosen],
            scores=self.scores[chosen],
            features={name: replace(both, queries=both.queries[chosen]) for name, both in self.features.items()},
        )

    def first(self, count: int) -> TeacherSet:
        """Truncates each query's ranking to its first `count` images.

        Raises:
            ValueError: The teacher scored fewer.
        """
        if not 1 <= count <= self.rows.shape[1]:
            raise ValueError(
                f"The teacher scored {self.rows.shape[1]} images per query; the first {count} were requested."
            )
        return replace(self, rows=self.rows[:, :count], scores=self.scores[:, :count])

    def concatenated(self, names: Sequence[str]) -> Features:
        """Concatenates the features of several encoders.

        Raises:
            ValueError: The set has no features of that name.
        """
        missing = [name for name in names if name not in self.features]
        if missing or not names:
            raise ValueError(
                f"The teacher set has no features {missing[0] if missing else '(none named)'!r}; it has "
                f"{', '.join(sorted(self.features))}."
            )
        parts = [self.features[name] for name in names]
        if len(parts) == 1:
            return parts[0]
        return Features(
            np.concatenate([part.training for part in parts], axis=1),
            np.concatenate([part.queries for part in parts], axis=1),
        )


def write_teacher_set(folder: Path, teacher: TeacherSet) -> None:
    """Writes a teacher set.

    Raises:
        StorageError: A file could not be written.
    """
    training = pa.table(
        {"image": pa.array(teacher.images, pa.string()), "caption": pa.array(teacher.captions, pa.string())}
    )
    queries = pa.table(
        {
            "query": pa.array(teacher.queries, pa.string()),
            "prompt": pa.array(teacher.prompts, pa.string()),
            "images": _lists(teacher.rows.astype(np.int32)),
            "scores": _lists(teacher.scores.astype(np.float32)),
        }
    )
    for name, table in ((TRAINING, training), (QUERIES, queries)):
        with replacing(folder / name) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    for name, both in teacher.features.items():
        for part, matrix in (("training", both.training), ("queries", both.queries)):
            with replacing(_features_file(folder, name, part)) as temporary, temporary.open("wb") as stream:
                np.save(stream, np.ascontiguousarray(matrix, dtype=np.float32))
    write_manifest(folder, teacher.identity, features=sorted(teacher.features))


def read_teacher_set(folder: Path, features: Sequence[str] | None = None) -> TeacherSet:
    """Reads a teacher set; features are memory-mapped.

    Args:
        folder: Folder of the set.
        features: Names of the features to read; None reads all.

    Raises:
        FileNotFoundError: The folder holds no teacher set.
        ValueError: It is damaged, or has no features of a name.
    """
    manifest = read_manifest(folder)
    kept = manifest.get("features", [])
    chosen = list(kept) if features is None else list(features)
    unknown = [name for name in chosen if name not in kept]
    if unknown:
        raise ValueError(f"{folder} has no features {unknown[0]!r}; it has {', '.join(kept)}.")
    training, queries = _table(folder / TRAINING, ("image", "caption")), _table(folder / QUERIES, _QUERY_COLUMNS)
    try:
        return TeacherSet(
            tuple(training["image"].to_pylist()),
            tuple(training["caption"].to_pylist()),
            tuple(queries["query"].to_pylist()),
            tuple(queries["prompt"].to_pylist()),
            _matrix(queries["images"], np.dtype(np.int32)),
            _matrix(queries["scores"], np.dtype(np.float32)),
            {
                name: Features(*(_mapped(_features_file(folder, name, part)) for part in ("training", "queries")))
                for name in chosen
            },
            manifest["identity"],
        )
    except ValueError as error:
        raise ValueError(f"The teacher set {folder} cannot be used: {error}") from error


def has_features(folder: Path, name: str) -> bool:
    """Whether a teacher set has an encoder's features, which may be absent: they are large and cheap to recompute."""
    return all(_features_file(folder, name, part).exists() for part in ("training", "queries"))


_QUERY_COLUMNS = ("query", "prompt", "images", "scores")


def _features_file(folder: Path, name: str, part: str) -> Path:
    return folder / FEATURES / f"{name}.{part}.npy"


def _mapped(path: Path) -> NDArray[np.float32]:
    matrix: NDArray[np.float32] = read_array(path, "r", "Copy the teacher set again")
    return matrix


def _table(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a table that can be read: {error}") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(table.column_names)}.")
    return table


def _lists(matrix: NDArray[Any]) -> pa.Array:
    count, width = matrix.shape
    offsets = np.arange(0, (count + 1) * width, max(width, 1), dtype=np.int64)[: count + 1]
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(matrix.reshape(-1)))


def _matrix(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> NDArray[Any]:
    lengths = {len(values) for values in column}
    if len(lengths) != 1:
        raise ValueError(f"the queries have between {min(lengths)} and {max(lengths)} scored images: all need as many.")
    flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
    return flat.astype(dtype, copy=False).reshape(len(column), lengths.pop())


def _repeated(ids: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _check_finite(matrix: NDArray[np.float32], what: str) -> None:
    for start in range(0, len(matrix), 65536):  # in blocks: the matrix may be larger than memory
        block = np.isfinite(matrix[start : start + 65536]).all(axis=1)
        if not block.all():
            raise ValueError(
                f"Row {start + int(np.flatnonzero(~block)[0])} of the {what} holds a number that is not finite."
            )
