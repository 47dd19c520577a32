"""What an index holds, in memory and in its files."""

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
    among,
    checked_rows,
    join_rows,
    keys_of,
    read_rows,
    with_keys,
    write_rows,
)
from wherefrom.index.embeddings import checked
from wherefrom.index.engine import Engine
from wherefrom.runtime.artifacts import hash_file

STATE = "index"  # entry of the manifest that changes with the index; its identity does not
FILES = {"index": "faiss", "rows": "parquet", "removed": "parquet"}
_BLOCK = 65536  # vectors added at a time


def read_removed(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Ids that were taken down, without opening the rest of the index.

    Raises:
        ValueError: The file is missing or damaged.
    """
    ids: list[str] = read_rows(folder / manifest[STATE]["names"]["removed"], (IMAGE,))[IMAGE].to_pylist()
    return ids


class Contents:
    """What an index holds, in memory: changed there, then written as a whole.

    Args:
        engine: The vectors.
        rows: The images; rows may lack for vectors that could not be taken out.
        removed: Ids taken down.
        next_key: The first key that no vector ever had.
        trained: Hash of the trained, empty FAISS index.
        search: FAISS's search settings.
        sources: Identities of the training sets that went in.
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
        """Adds images that were not taken down; returns the ids of those that were.

        Raises:
            ValueError: An image is there already, the numbers of rows and vectors differ, or a vector is no unit one.
        """
        checked_rows(rows)
        check_shapes(rows, vectors, self.engine.dimension)
        left_out = among(rows, self.removed)
        chosen = np.flatnonzero(~left_out)
        fresh = rows.take(chosen)
        check_new(self.rows, fresh)
        keys = self.next_key + np.arange(len(chosen), dtype=np.int64)
        blocks = [slice(start, start + _BLOCK) for start in range(0, len(chosen), _BLOCK)]
        for block in blocks:  # all are looked at before any is added
            checked(vectors[chosen[block]])
        for block in blocks:
            self.engine.add(checked(vectors[chosen[block]]), keys[block])
        self.rows = join_rows(self.rows, with_keys(fresh, keys))
        self.next_key += len(chosen)
        self.sources.append(source)
        return tuple(rows[IMAGE].filter(pa.array(left_out)).to_pylist())

    def remove(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Takes images down; returns the ids that it did not hold, which are kept out from now on too."""
        given = set(ids)
        there = among(self.rows, given)
        result = self.rows.filter(pa.array(there))
        self.engine.remove(keys_of(result))
        self.rows = self.rows.filter(pa.array(~there))
        self.removed |= given
        return tuple(sorted(given.difference(result[IMAGE].to_pylist())))

    def merge(self, other: Contents) -> None:
        """Moves another's images in; what either took down stays down.

        Raises:
            ValueError: Both hold an image, or the two were trained apart.
        """
        if other.trained != self.trained:
            raise ValueError(
                "The two indexes were trained on different samples, so their codes mean different things: build the "
                "second with like=FIRST, which takes over its training."
            )
        taken = self.removed | other.removed
        self.remove(taken)
        other.remove(taken)
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
        """Writes its files; returns the manifest's entry that makes them count.

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
        """Reads the files that count.

        Raises:
            ValueError: A file is missing, damaged, or another's.
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
                f"{paths['index']} holds {len(engine)} vectors of {engine.dimension} numbers, but its manifest speaks "
                f"of {state['pictures']} of {dimension}: the file is another index's. Copy the whole folder again."
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
    """Refuses vectors that do not fit.

    Raises:
        ValueError: There are none, not as many as rows, or of another width.
    """
    if len(rows) != len(vectors) or vectors.shape[1] != dimension or len(rows) == 0:
        raise ValueError(
            f"{len(rows)} images and vectors of shape {vectors.shape} do not fit: as many of {dimension} numbers "
            "each are needed, at least one."
        )


def check_new(held: pa.Table, fresh: pa.Table) -> None:
    """Refuses images that are held already.

    Raises:
        ValueError: Names one.
    """
    twice = fresh.filter(pa.array(among(fresh, held[IMAGE].to_pylist())))
    if len(twice):
        raise ValueError(
            f"{len(twice)} images are in the index already, such as {twice[0][0].as_py()!r}: leave them out, or "
            "remove and restore them first."
        )


def _check_file(path: Path, expected: Mapping[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the index is not whole. Copy the whole folder again, or build it again.")
    size = path.stat().st_size
    if size != expected["bytes"] or (verify and hash_file(path) != expected["hash"]):
        raise ValueError(
            f"{path} ({size} bytes) is not the file that its manifest speaks of ({expected['bytes']} bytes, hash "
            f"{expected['hash']}): it is damaged or another's. Copy the whole folder again, or build it again."
        )
