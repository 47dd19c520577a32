"""Catalog of an index: metadata of its images, one row each, as a Parquet table beside the vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64
from numpy.typing import NDArray

from wherefrom.data.image_set import ImageSet
from wherefrom.runtime.artifacts import replacing

KEY, IMAGE, CAPTIONS = "key", "image", "captions"
# Large Arrow types: captions of ten million images exceed two gigabytes.
_TYPES = {KEY: pa.int64(), IMAGE: pa.large_string(), CAPTIONS: pa.large_list(pa.large_string())}


def rows_of(images: ImageSet) -> pa.Table:
    """Builds the catalog of images: ids, captions and all further columns (such as `group` and `license`).

    Raises:
        ValueError: A further column has a reserved name.
    """
    return catalog_rows(images.ids, images.captions, images.columns)


def catalog_rows(
    ids: Sequence[str], captions: Iterable[Sequence[str]], columns: Mapping[str, Sequence[str]] | None = None
) -> pa.Table:
    """Builds a catalog, one row per image.

    Raises:
        ValueError: A further column has a reserved name, or an id occurs twice.
    """
    further = {} if columns is None else columns
    reserved = sorted(_TYPES.keys() & further.keys())
    if reserved:
        raise ValueError(f"A column may not be called {reserved[0]!r}: the index has one of that name; rename it.")
    own = {IMAGE: pa.array(ids, _TYPES[IMAGE]), CAPTIONS: pa.array([list(c) for c in captions], _TYPES[CAPTIONS])}
    return validate_rows(
        pa.table({**own, **{name: pa.array(column, pa.large_string()) for name, column in further.items()}})
    )


def validate_rows(rows: pa.Table) -> pa.Table:
    """Validates a catalog: required columns, and ids present and unique.

    Raises:
        ValueError: The catalog is invalid.
    """
    missing = [name for name in (IMAGE, CAPTIONS) if name not in rows.column_names]
    if missing:
        raise ValueError(f"The rows have no column {missing[0]!r}; they have {', '.join(rows.column_names)}.")
    if rows[IMAGE].null_count:
        raise ValueError("An image has no id: every row needs one.")
    counts = pc.value_counts(rows[IMAGE])
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise ValueError(
            f"{len(twice)} image ids occur more than once, such as {twice[0]['values'].as_py()!r}. Ids must be unique."
        )
    return rows


def with_keys(rows: pa.Table, keys: Int64[NDArray[np.int64], " n"]) -> pa.Table:
    """Adds FAISS ids as the first column, and casts to the types of the index."""
    columns = {KEY: pa.array(keys, pa.int64())}
    columns |= {name: rows[name].cast(_TYPES.get(name, pa.large_string())) for name in rows.column_names if name != KEY}
    return pa.table(columns)


def keys_of(rows: pa.Table) -> Int64[NDArray[np.int64], " n"]:
    """Extracts the FAISS ids of the rows, ascending."""
    keys: NDArray[np.int64] = rows[KEY].to_numpy()
    return keys


def id_mask(rows: pa.Table, ids: Iterable[str]) -> Bool[NDArray[np.bool_], " n"]:
    """Marks the rows that have one of the ids."""
    mask: NDArray[np.bool_] = pc.is_in(rows[IMAGE], pa.array(list(ids), pa.large_string())).to_numpy()
    return mask


def join_rows(first: pa.Table, second: pa.Table) -> pa.Table:
    """Concatenates two catalogs; missing columns are null."""
    return pa.concat_tables([first, second], promote_options="default")


def write_rows(path: Path, rows: pa.Table) -> None:
    """Writes a table.

    Raises:
        StorageError: The file could not be written.
    """
    with replacing(path) as temporary:
        pq.write_table(rows, temporary, compression="zstd")


def read_rows(path: Path, columns: Sequence[str]) -> pa.Table:
    """Reads a table as a single chunk, for fast row lookup.

    Raises:
        ValueError: It cannot be read, or lacks a column.
    """
    try:
        rows = pq.read_table(path, memory_map=True).combine_chunks()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable table ({error}); build the index again.") from error
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(rows.column_names)}.")
    return rows
