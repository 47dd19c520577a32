"""Rows kept by the content that they were made of, in append-only files: what is there is never made again.

An artifact holds segments: `rows-00000.npy`, one row of bytes each, beside `rows-00000.keys`, the hashes of the
contents in the same order. Each run that has something to add appends one segment. A segment grows under another name
(`GrowingArray`) and is safe batch by batch, so an interrupted run, or another one that needs some of the same rows,
goes on from the last batch. `layout.json` says which named arrays a row holds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.runtime.artifacts import Identity, Store, storage_errors, write_json
from wherefrom.runtime.checked_files import read_object
from wherefrom.runtime.mapped_arrays import GrowingArray, JoinedRows, gather_rows, map_array

LAYOUT = "layout.json"
KEY_BYTES = 16  # bytes of a hash
_ALIGNED = 8  # each array of a row begins at a multiple of this, as its numbers need
Keys = NDArray[np.bytes_]


def content_keys(contents: Iterable[bytes]) -> Keys:
    """One hash for each content."""
    digests = b"".join(hashlib.blake2b(content, digest_size=KEY_BYTES).digest() for content in contents)
    return np.frombuffer(digests, dtype=f"S{KEY_BYTES}")


@dataclass(frozen=True)
class Entry:
    """One named array of a row.

    Attributes:
        shape: Its shape.
        dtype: NumPy's name of its type.
        offset: Where it begins, in bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def end(self) -> int:
        """Where the next array may begin."""
        return self.offset + -(-self.size // _ALIGNED) * _ALIGNED

    def of(self, rows: Tensor) -> Tensor:
        """This array of all rows: a view of the bytes."""
        whole = rows[:, self.offset : self.offset + self.size]
        kind: torch.dtype = getattr(torch, self.dtype)
        return whole.view(kind).reshape(len(rows), *self.shape) if len(rows) else torch.zeros(0, *self.shape).to(kind)


class ContentRows:
    """Rows of named arrays by content, kept in a store.

    Args:
        store: The store.
        kind: Kind of artifact.
        identity: What decides a row beside its content: the encoder's identity.
    """

    def __init__(self, store: Store, kind: str, identity: Identity) -> None:
        self.store, self.kind, self.identity = store, kind, identity
        self.folder = store.make(kind, identity, lambda folder: None)

    def layout(self, like: Callable[[], Mapping[str, Tensor]]) -> dict[str, Entry]:
        """What a row holds, by name.

        Args:
            like: Makes one row; called where none was ever made.
        """
        file = self.folder / LAYOUT
        if not file.exists():
            entries: dict[str, Entry] = {}
            offset = 0
            for name, each in like().items():
                entries[name] = Entry(tuple(each.shape), str(each.dtype).removeprefix("torch."), offset)
                offset = entries[name].end
            write_json(file, {name: vars(entry) for name, entry in entries.items()})
        kept = read_object(file)
        return {name: Entry(tuple(each["shape"]), each["dtype"], each["offset"]) for name, each in kept.items()}

    def row_bytes(self, like: Callable[[], Mapping[str, Tensor]]) -> int:
        """Size of a row on disk; for `like` see `layout`."""
        return max(entry.end for entry in self.layout(like).values())

    def _segment(self, number: int) -> Path:
        return self.folder / f"rows-{number:05d}.npy"

    def _segments(self) -> list[Path]:
        return sorted(self.folder.glob("rows-*.npy"))

    def _keys_of(self, segment: Path, count: int) -> Keys:
        """The hashes of a segment's first rows; there may be more hashes than rows that were safe."""
        keys: Keys = np.fromfile(segment.with_suffix(".keys"), dtype=f"S{KEY_BYTES}", count=count)
        return keys

    def _known(self) -> tuple[Keys, NDArray[np.intp], NDArray[np.intp], list[Tensor]]:
        """Sorted hashes with the segment and the row of each, and the segments' bytes."""
        arrays = [map_array(segment) for segment in self._segments()]
        keys = [self._keys_of(path, len(array)) for path, array in zip(self._segments(), arrays, strict=False)]
        if not keys:
            return np.zeros(0, f"S{KEY_BYTES}"), np.zeros(0, np.intp), np.zeros(0, np.intp), []
        segment = np.concatenate([np.full(len(each), number, np.intp) for number, each in enumerate(keys)])
        row = np.concatenate([np.arange(len(each)) for each in keys])
        flat = np.concatenate(keys)
        order = np.argsort(flat, kind="stable")
        return flat[order], segment[order], row[order], arrays

    def has(self, keys: Keys) -> NDArray[np.bool_]:
        """Which of these contents have a row."""
        return _find(self._known()[0], keys)[0]

    def fill(
        self,
        keys: Keys,
        groups: Sequence[Sequence[int]],
        *,
        make: Callable[[list[int]], Mapping[str, Tensor]],
        like: Callable[[], Mapping[str, Tensor]],
        finished: Callable[[int], None],
    ) -> None:
        """Makes the rows of the contents that have none; one run at a time does, and others wait and find them.

        Args:
            keys: The contents' hashes.
            groups: Positions in `keys` that are made, and are safe, together.
            make: Makes the rows of the contents at some positions.
            like: Makes one row, where none was ever made.
            finished: Called with the number of each group when rows of it were made and are safe.

        Raises:
            StorageError: A file could not be written; finished groups are kept.
        """
        if self.has(keys).all():
            return
        with self.store.lock(self.kind, self.identity), storage_errors(self.folder):
            layout = self.layout(like)
            path = self._segment(len(self._segments()))
            names = path.with_suffix(".keys")
            with GrowingArray(path, (self.row_bytes(like),), np.uint8) as array:
                names.touch()
                os.truncate(names, array.rows * KEY_BYTES)
                there = set(self._known()[0].tolist()) | set(self._keys_of(path, array.rows).tolist())
                for number, group in enumerate(groups):
                    todo = list(
                        {keys[position]: position for position in group if keys[position] not in there}.values()
                    )
                    if todo:
                        self._append(array, names, keys[todo], _packed(make(todo), layout, len(todo)))
                        there.update(keys[todo].tolist())
                        finished(number)
                if array.rows:
                    array.finish()

    @staticmethod
    def _append(array: GrowingArray, names: Path, keys: Keys, rows: NDArray[np.uint8]) -> None:
        with names.open("ab") as stream:  # the hashes first: those of rows that are not safe are cut off later
            stream.write(np.ascontiguousarray(keys).tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        array.append(rows)

    def rows(self, keys: NDArray[np.bytes_]) -> dict[str, Any]:
        """The rows of these contents by name, with the leading axes of `keys`; mapped from disk.

        An unbroken stretch is a view of one file, little is copied, else the rows are read where they are used.

        Raises:
            KeyError: A content has no row.
        """
        known, segment, row, arrays = self._known()
        found, where = _find(known, keys.reshape(-1))
        if not found.all():
            raise KeyError(f"{self.folder} lacks {int((~found).sum())} of {keys.size} rows.")
        layout = self.layout(dict)
        used = np.unique(segment[where])
        starts, offset = np.zeros(len(arrays), np.intp), 0
        for number in used:
            starts[number], offset = offset, offset + len(arrays[number])
        index = (starts[segment[where]] + row[where]).reshape(keys.shape)
        result = {}
        for name, entry in layout.items():
            joined: Any = entry.of(arrays[used[0]])
            for number in used[1:]:
                joined = JoinedRows(joined, entry.of(arrays[number]))
            result[name] = gather_rows(joined, index)
        return result


def _find(known: Keys, keys: Keys) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Which keys are known, and where among the sorted known ones."""
    if not len(known):
        return np.zeros(len(keys), np.bool_), np.zeros(len(keys), np.intp)
    where = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.asarray(known[where] == keys), where


def _packed(made: Mapping[str, Tensor], layout: Mapping[str, Entry], count: int) -> NDArray[np.uint8]:
    """Named arrays of some rows as rows of bytes."""
    rows = np.zeros((count, max(entry.end for entry in layout.values())), np.uint8)
    assert made.keys() == layout.keys()
    for name, entry in layout.items():
        values = np.ascontiguousarray(made[name].numpy())
        assert values.shape == (count, *entry.shape), "the same identity gives rows of the same shape"
        rows[:, entry.offset : entry.offset + entry.size] = values.reshape(count, -1).view(np.uint8)
    return rows
