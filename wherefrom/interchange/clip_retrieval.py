"""Embeddings in clip-retrieval's layout: export for its tools, and import of its output into an index.

A folder holds parts in equally numbered files, zero-padded so that they sort by name:

- `img_emb/img_emb_0.npy`: unit vectors, float16 or float32, one row per image;
- `metadata/metadata_0.parquet`: `image_path`, `caption`, and added columns: `id`, `captions` and others.

Exported folders also have a `manifest.json` with the identity of the encoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wherefrom.index.catalog import CAPTIONS, IMAGE, KEY, validate_rows
from wherefrom.index.embeddings import Embeddings, unit_vectors
from wherefrom.runtime.artifacts import MANIFEST, check_identity, hash_file, read_manifest, replacing, write_manifest
from wherefrom.runtime.console import Progress
from wherefrom.runtime.mapped_arrays import write_array

VECTORS, METADATA = "img_emb", "metadata"
ID, PATH, CAPTION = "id", "image_path", "caption"
_NUMBERED = re.compile(r"_(\d+)\.(?:npy|parquet)$")
_BLOCK = 65536


def write_clip_retrieval(
    folder: Path,
    *,
    rows: pa.Table,
    embeddings: Embeddings,
    training: Mapping[str, Any],
    part: int = 1_000_000,
    dtype: Literal["float16", "float32"] = "float16",
    progress: Progress | None = None,
) -> None:
    """Writes embeddings for clip-retrieval; an interrupted run is resumed.

    Args:
        folder: Output folder.
        rows: Catalog of the images, as for an index. `image_path` is the column `file_name`, or else the id.
        embeddings: Their embeddings, in the same order.
        training: Identity of the training set.
        part: Images per part.
        dtype: Precision of the vectors.
        progress: Called with (done, total) images.

    Raises:
        ArtifactMismatchError: The folder holds other embeddings.
        ValueError: The numbers of rows and embeddings differ, or an embedding is not a unit vector.
        StorageError: A file could not be written; finished parts are kept.
    """
    validate_rows(rows)
    if len(rows) != len(embeddings) or not len(rows) or part < 1:
        raise ValueError(
            f"{len(rows)} images, {len(embeddings)} embeddings and parts of {part}: images and embeddings must be "
            "equally many, at least one, and parts must hold at least one."
        )
    identity = {
        "clip_retrieval": 1,
        "ranker": dict(embeddings.ranker),
        "training": dict(training),
        "part": part,
        "dtype": dtype,
        "pictures": len(rows),
    }
    if (folder / MANIFEST).exists():
        check_identity(folder, identity)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, identity, complete=False)
    metadata = _metadata(rows)
    starts = range(0, len(rows), part)
    digits, parts = len(str(len(starts) - 1)), {}
    for number, start in enumerate(starts):
        stop = min(start + part, len(rows))
        name = str(number).zfill(digits)
        vectors, table = _paths(folder, name)
        if not vectors.exists() or not table.exists():  # each is complete or absent
            blocks = (
                unit_vectors(embeddings.vectors[first : min(first + _BLOCK, stop)], first)
                for first in range(start, stop, _BLOCK)
            )
            write_array(vectors, (stop - start, embeddings.vectors.shape[1]), blocks, dtype)
            with replacing(table) as temporary:
                pq.write_table(metadata.slice(start, stop - start), temporary)
        parts[name] = {"pictures": stop - start, "vectors": hash_file(vectors), "metadata": hash_file(table)}
        if progress is not None:
            progress(stop, len(rows))
    write_manifest(folder, identity, complete=True, parts=parts)


def read_clip_retrieval(folder: Path, ranker: Mapping[str, Any] | None = None) -> tuple[pa.Table, Embeddings]:
    """Reads embeddings in clip-retrieval's layout, for `build_index`.

    Args:
        folder: Folder of the embeddings.
        ranker: Identity of the encoder, for folders written by another tool; it becomes the index's ranker.

    Raises:
        ValueError: A part or column is missing or damaged, numbers of rows differ, or the encoder is unknown.
    """
    named = {kind: _numbered(folder / kind, end) for kind, end in ((VECTORS, "npy"), (METADATA, "parquet"))}
    if not named[VECTORS] or named[VECTORS].keys() != named[METADATA].keys():
        numbers = {kind: sorted(files) for kind, files in named.items()}
        raise ValueError(
            f"{folder} must hold {VECTORS}/{VECTORS}_0.npy … and {METADATA}/{METADATA}_0.parquet … with the same "
            f"numbers; their numbers are {numbers}."
        )
    encoder = _encoder_identity(folder, ranker)
    vectors, tables = [], []
    for number in sorted(named[VECTORS]):
        one, table = named[VECTORS][number], named[METADATA][number]
        vectors.append(_read_vectors(one))
        tables.append(_read_metadata(table))
        if len(vectors[-1]) != len(tables[-1]):
            raise ValueError(
                f"{one} has {len(vectors[-1])} rows, {table} {len(tables[-1])}: they do not belong together."
            )
        if vectors[-1].shape[1] != vectors[0].shape[1]:
            raise ValueError(
                f"{one} has vectors of {vectors[-1].shape[1]} numbers, the parts before {vectors[0].shape[1]}."
            )
    rows = validate_rows(pa.concat_tables(tables, promote_options="default"))
    return rows, Embeddings(vectors[0] if len(vectors) == 1 else np.concatenate(vectors), encoder)


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / VECTORS / f"{VECTORS}_{name}.npy", folder / METADATA / f"{METADATA}_{name}.parquet"


def _metadata(rows: pa.Table) -> pa.Table:
    """Builds the metadata table: clip-retrieval's columns, then the catalog's."""
    reserved = sorted({ID, PATH, CAPTION} & set(rows.column_names))
    if reserved:
        raise ValueError(f"A column may not be called {reserved[0]!r}: clip-retrieval's layout reserves it; rename it.")
    captions = rows[CAPTIONS].combine_chunks()
    first = pa.array([several[0] if several else "" for several in captions.to_pylist()], pa.string())
    path = rows["file_name"] if "file_name" in rows.column_names else rows[IMAGE]
    columns = {PATH: path.cast(pa.string()), CAPTION: first, ID: rows[IMAGE].cast(pa.string()), CAPTIONS: captions}
    further = {name: rows[name] for name in rows.column_names if name not in (IMAGE, CAPTIONS, KEY)}
    return pa.table({**columns, **further})


def _numbered(folder: Path, end: str) -> dict[int, Path]:
    files = [(match, path) for path in folder.glob(f"*.{end}") if (match := _NUMBERED.search(path.name))]
    return {int(match[1]): path for match, path in files}


def _encoder_identity(folder: Path, ranker: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if not (folder / MANIFEST).exists():
        if ranker is None:
            raise ValueError(
                f"{folder} was written by another tool, and does not say which encoder computed its vectors: give it "
                "as `ranker`, such as {'encoder': 'ViT-B/32'}; queries must give the same."
            )
        return ranker
    manifest = read_manifest(folder)
    if not manifest.get("complete"):
        raise ValueError(f"{folder} is not complete: write it again, it resumes where it stopped.")
    own: Mapping[str, Any] = manifest["identity"]["ranker"]
    if ranker is not None and dict(ranker) != dict(own):
        raise ValueError(f"{folder} holds embeddings of {own}, not of {dict(ranker)}.")
    for name, expected in manifest["parts"].items():
        for path, key in zip(_paths(folder, name), ("vectors", "metadata"), strict=True):
            if not path.exists() or hash_file(path) != expected[key]:
                raise ValueError(f"{path} is missing or does not match {folder / MANIFEST}: copy it again.")
    return own


def _read_vectors(path: Path) -> NDArray[np.floating[Any]]:
    try:
        vectors: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a readable NumPy file: {error}") from error
    if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32):
        raise ValueError(
            f"{path} holds {vectors.dtype} of shape {vectors.shape}; embeddings are float16 or float32 matrices."
        )
    return vectors


def _read_metadata(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable table: {error}") from error
    known = ID if ID in table.column_names else PATH
    if known not in table.column_names:
        raise ValueError(f"{path} has neither {ID!r} nor {PATH!r}, so its images have no ids.")
    columns = {IMAGE: table[known].cast(pa.large_string()), CAPTIONS: _captions(table)}
    for name in table.column_names:
        if name not in (ID, CAPTION, CAPTIONS) and (name != PATH or known == PATH):
            columns.setdefault("file_name" if name == PATH else name, table[name].cast(pa.large_string()))
    return pa.table({name: column for name, column in columns.items() if name != KEY})


def _captions(table: pa.Table) -> Any:
    if CAPTIONS in table.column_names:
        return table[CAPTIONS].cast(pa.large_list(pa.large_string()))
    if CAPTION not in table.column_names:
        return pa.array([[]] * len(table), pa.large_list(pa.large_string()))
    texts = pc.fill_null(table[CAPTION].cast(pa.large_string()), "").combine_chunks()
    offsets = pa.array(np.arange(len(table) + 1, dtype=np.int64))
    return pa.LargeListArray.from_arrays(offsets, texts)
