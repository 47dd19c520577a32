"""State of an index in memory, and its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from wherefrom.index.catalog import (
    CAPTIONS,
    IMAGE,
    KEY,
    id_mask,
    join_rows,
    keys_of,
    read_rows,
    validate_rows,
    with_keys,
    write_rows,
)
from wherefrom.index.embeddings import unit_vectors
from wherefrom.index.engine import Engine
from wherefrom.runtime.artifacts import hash_file

STATE = "index"  # entry of the manifest that changes with the index; its identity does not
FILES = {"index": "faiss", "rows": "parquet", "removed": "parquet"}
_BLOCK = 65536  # vectors added at a time


def read_removed(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Reads the ids of removed images, without opening the rest of the index.

    Raises:
        ValueError: The file is missing or damaged.
    """
    ids: list[str] = read_rows(folder / manifest[STATE]["names"]["removed"], (IMAGE,))[IMAGE].to_pylist()
    return ids


class Contents:
    """State of an index: modified in memory, then written as a whole.

    Args:
        engine: The vectors.
        rows: Catalog of the images; vectors that the engine cannot delete have no row.
        removed: Ids of removed images.
        next_key: The first key that was never used.
        trained: Hash of the trained, empty FAISS index.
        search: FAISS search settings.
        sources: Identities of the training sets that were added.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        rows: pa.Table,
        removed: Iterable[str],
        next_key: int,
        trained: str,
        search: str,
        sources: Sequence[Any],
    ) -> None:
        self.engine, self.rows, self.removed, self.next_key = engine, rows, set(removed), next_key
        self.trained, self.search, self.sources = trained, search, list(sources)

    def add(self, rows: pa.Table, vectors: NDArray[np.floating[Any]], source: Any) -> tuple[str, ...]:
        """Adds images, except removed ones, whose ids it returns.

        Raises:
            ValueError: An image is already in the index, the numbers of rows and vectors differ, or a vector is not
                of unit length.
        """
        validate_rows(rows)
        check_shapes(rows, vectors, self.engine.dimension)
        left_out = id_mask(rows, self.removed)
        chosen = np.flatnonzero(~left_out)
        fresh = rows.take(chosen)
        check_new(self.rows, fresh)
        keys = self.next_key + np.arange(len(chosen), dtype=np.int64)
        blocks = [slice(start, start + _BLOCK) for start in range(0, len(chosen), _BLOCK)]
        for block in blocks:  # all are validated before any is added
            unit_vectors(vectors[chosen[block]])
        for block in blocks:
            self.engine.add(unit_vectors(vectors[chosen[block]]), keys[block])
        self.rows = join_rows(self.rows, with_keys(fresh, keys))
        self.next_key += len(chosen)
        self.sources.append(source)
        return tuple(rows[IMAGE].filter(pa.array(left_out)).to_pylist())

    def remove(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Removes images; returns the ids that the index did not hold, which are excluded from now on too."""
        given = set(ids)
        present = id_mask(self.rows, given)
        deleted = self.rows.filter(pa.array(present))
        self.engine.remove(keys_of(deleted))
        self.rows = self.rows.filter(pa.array(~present))
        self.removed |= given
        return tuple(sorted(given.difference(deleted[IMAGE].to_pylist())))

    def merge(self, other: Contents) -> None:
        """Moves the images of another index into this one; images removed from either stay removed.

        Raises:
            ValueError: An image is in both, or the two were trained separately.
        """
        if other.trained != self.trained:
            raise ValueError(
                "The two indexes were trained on different samples, so their codes are not comparable: build the "
                "second with like=FIRST, which reuses its training."
            )
        removed = self.removed | other.removed
        self.remove(removed)
        other.remove(removed)
        check_new(self.rows, other.rows)
        keys = keys_of(other.rows)
        if self.engine.can_merge:
            self.engine.merge(other.engine, self.next_key)
        else:
            for start in range(0, len(keys), _BLOCK):
                block = keys[start : start + _BLOCK]
                self.engine.add(other.engine.vectors(block), block + self.next_key)
        self.rows = join_rows(self.rows, with_keys(other.rows, keys + self.next_key))
        self.next_key += other.next_key
        self.sources += other.sources

    def write(self, folder: Path, change: int) -> dict[str, Any]:
        """Writes the files; returns the manifest entry that makes them current.

        Raises:
            StorageError: A file could not be written.
        """
        names = {kind: f"{kind}-{change:06d}.{end}" for kind, end in FILES.items()}
        self.engine.write(folder / names["index"])
        write_rows(folder / names["rows"], self.rows)
        write_rows(folder / names["removed"], pa.table({IMAGE: pa.array(sorted(self.removed), pa.large_string())}))
        files = {
            name: {"bytes": (folder / name).stat().st_size, "hash": hash_file(folder / name)} for name in names.values()
        }
        return {
            "change": change,
            "names": names,
            "files": files,
            "pictures": len(self.rows),
            "next_key": self.next_key,
            "trained": self.trained,
            "search": self.search,
            "sources": self.sources,
        }

    @classmethod
    def read(cls, folder: Path, manifest: Mapping[str, Any], mmap: bool = False, verify: bool = True) -> Contents:
        """Reads the current files.

        Raises:
            ValueError: A file is missing, damaged, or of another index.
        """
        state: Mapping[str, Any] = manifest[STATE]
        for name, expected in state["files"].items():
            _check_file(folder / name, expected, verify)
        paths = {kind: folder / name for kind, name in state["names"].items()}
        engine = Engine.read(paths["index"], mmap)
        rows = read_rows(paths["rows"], (KEY, IMAGE, CAPTIONS))
        removed = read_removed(folder, manifest)
        dimension = manifest["identity"]["dimension"]
        if engine.dimension != dimension or len(engine) < len(rows) or len(rows) != state["pictures"]:
            raise ValueError(
                f"{paths['index']} holds {len(engine)} vectors of {engine.dimension} numbers, but its manifest lists "
                f"{state['pictures']} of {dimension}: the file belongs to another index. Copy the whole folder again."
            )
        return cls(
            engine,
            rows=rows,
            removed=removed,
            next_key=state["next_key"],
            trained=state["trained"],
            search=state["search"],
            sources=state["sources"],
        )


def check_shapes(rows: pa.Table, vectors: NDArray[np.floating[Any]], dimension: int) -> None:
    """Raises if vectors do not fit the rows or the index.

    Raises:
        ValueError: There are none, their number differs from the rows, or their width from the index.
    """
    if len(rows) != len(vectors) or vectors.shape[1] != dimension or len(rows) == 0:
        raise ValueError(
            f"{len(rows)} images and vectors of shape {vectors.shape} do not fit: there must be one vector of "
            f"{dimension} numbers per image, and at least one image."
        )


def check_new(held: pa.Table, fresh: pa.Table) -> None:
    """Raises if images are already in the index.

    Raises:
        ValueError: An image is; names one.
    """
    twice = fresh.filter(pa.array(id_mask(fresh, held[IMAGE].to_pylist())))
    if len(twice):
        raise ValueError(
            f"{len(twice)} images are in the index already, such as {twice[0][0].as_py()!r}: leave them out, or "
            "remove and restore them first."
        )


def _check_file(path: Path, expected: Mapping[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the index is incomplete. Copy the whole folder again, or build it again.")
    size = path.stat().st_size
    if size != expected["bytes"] or (verify and hash_file(path) != expected["hash"]):
        raise ValueError(
            f"{path} ({size} bytes) does not match its manifest ({expected['bytes']} bytes, hash {expected['hash']}): "
            "it is damaged or belongs to another index. Copy the whole folder again, or build it again."
        )
