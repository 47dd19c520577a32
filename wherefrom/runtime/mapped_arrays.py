"""Arrays on disk, written block by block and memory-mapped: never in memory as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from wherefrom.runtime.artifacts import replacing, storage_errors, write_json
from wherefrom.runtime.checked_files import read_array, read_object

_LAZY_FROM = 2**28  # bytes from which a selection becomes a lazy view instead of a copy


def write_array(path: Path, shape: tuple[int, ...], blocks: Iterable[Any], dtype: DTypeLike = np.float32) -> None:
    """Streams blocks into one `.npy` file. Plain writes, not a memory map: a full disk is then an error, not a crash.

    Raises:
        StorageError: The file could not be written.
    """
    with replacing(path) as temporary, temporary.open("wb") as stream:
        _write_header(stream, shape, dtype)
        for block in blocks:
            stream.write(np.ascontiguousarray(block, dtype=dtype).tobytes())


def _write_header(stream: BinaryIO, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Writes the header of a `.npy` file; its length does not depend on the first dimension."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(stream, header)


def map_array(path: Path) -> Tensor:
    """Memory-maps the array of a `.npy` file."""
    return torch.from_numpy(read_array(path, "c"))  # copy on write: torch requires writable memory


class GrowingArray:
    """Append-only `.npy` file that resumes after an interruption from the last block written safely.

    It grows under a temporary name, beside a journal of what is safely on disk, and is renamed when complete. Unlike
    parts that are joined afterwards, it never takes twice its size on disk.

    Args:
        path: The finished file.
        row: Shape of a row.
        dtype: Element type.
    """

    def __init__(self, path: Path, row: tuple[int, ...], dtype: DTypeLike) -> None:
        self.path, self.row, self.dtype = path, row, np.dtype(dtype)
        self._growing = path.with_name(f"{path.name}.growing")
        self._journal = path.with_name(f"{path.name}.journal.json")
        self.rows = 0
        self.note: dict[str, int] = {}
        self._stream: BinaryIO | None = None

    @property
    def finished(self) -> bool:
        """Whether the file is complete."""
        return self.path.exists()

    def __enter__(self) -> GrowingArray:
        if self.finished:
            return self
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._growing.exists() and self._journal.exists():
                kept = read_object(self._journal, ("row", "rows", "note"))
                assert kept["row"] == list(self.row), "the same identity gives rows of the same shape"
                self.rows, self.note = kept["rows"], kept["note"]
                self._stream = self._growing.open("r+b")
            else:
                self._stream = self._growing.open("w+b")
            self._stream.seek(0)
            _write_header(self._stream, (self.rows, *self.row), self.dtype)
            # Bytes after the last safe row were being written when the earlier run ended.
            self._stream.truncate(self._stream.tell() + self.rows * self._row_bytes)
            self._stream.seek(0, os.SEEK_END)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.row, dtype=np.int64)) * self.dtype.itemsize

    def append(self, block: Any, **note: int) -> None:
        """Appends rows and updates the note kept with them; both are synced to disk on return.

        Raises:
            StorageError: They could not be written; the next run adds them again.
        """
        assert self._stream is not None, "the array is open and not finished"
        rows = np.ascontiguousarray(block, dtype=self.dtype)
        assert rows.shape[1:] == self.row
        with storage_errors(self.path):
            if rows.size:
                self._stream.write(rows.data)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self.rows, self.note = self.rows + len(rows), {**self.note, **note}
        write_json(self._journal, {"rows": self.rows, "row": list(self.row), "note": self.note})

    def finish(self) -> None:
        """Writes the final number of rows into the header and renames the file.

        Raises:
            StorageError: The file could not be written.
        """
        assert self._stream is not None, "the array is open and not finished"
        with storage_errors(self.path):
            self._stream.seek(0)
            _write_header(self._stream, (self.rows, *self.row), self.dtype)
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._growing.replace(self.path)
            self._journal.unlink(missing_ok=True)


class RowView:
    """Lazy view of some rows of a mapped array, for selections that do not fit in memory.

    Indexed like the array itself; full slices (`[:]`, `[:, 0]`) stay a view.

    Args:
        array: A tensor, a NumPy array or `JoinedRows`.
        rows: Positions of the rows, in one or more dimensions (such as images × captions).
    """

    def __init__(self, array: Any, rows: NDArray[np.intp]) -> None:
        self.array, self.rows = array, rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an array of these rows alone."""
        return (*self.rows.shape, *(int(extent) for extent in self.array.shape[1:]))

    @property
    def dtype(self) -> Any:
        """Element type."""
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        """Size of these rows on disk."""
        return int(np.prod(self.shape, dtype=np.int64)) * int(self.array.itemsize)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        if self.rows.ndim > 1:
            return self._of_grid(key if isinstance(key, tuple) else (key,))
        first, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(first, slice) and first == slice(None):
            return RowView(self.array[(slice(None), *rest)], self.rows)
        rows = torch.from_numpy(self.rows) if isinstance(self.array, Tensor) else self.rows
        if isinstance(first, slice):  # as with arrays, the rest then applies to every row of the slice
            return self.array[rows[first]][(slice(None), *rest)]
        return self.array[(rows[first], *rest)]

    def _of_grid(self, key: tuple[Any, ...]) -> Any:
        head, rest = key[: self.rows.ndim], key[self.rows.ndim :]
        rows = np.asarray(self.rows[tuple(map(_as_index, head))])
        if not rest and all(isinstance(each, slice) for each in head):
            return RowView(self.array, rows)
        return _read(self.array, rows)[(*(slice(None),) * rows.ndim, *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(_read(self.array, self.rows), dtype=dtype)


def take_rows(array: Any, rows: NDArray[np.intp]) -> Any:
    """Selects rows: a contiguous range shares memory, a large selection is a `RowView`, a small one is copied."""
    if isinstance(array, RowView) and array.rows.ndim > 1:
        return RowView(array.array, array.rows[rows])
    if len(rows) and rows[0] >= 0 and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return array[int(rows[0]) : int(rows[0]) + len(rows)] if len(rows) < len(array) else array
    if isinstance(array, RowView):
        return RowView(array.array, array.rows[rows])
    if len(rows) * array[:1].nbytes >= _LAZY_FROM:
        return RowView(array, rows)
    return array[torch.from_numpy(rows) if isinstance(array, Tensor) else rows]


class JoinedRows:
    """Lazy concatenation of two arrays along the rows, with the element type of the first.

    Indexed like one array; full slices (`[:]`, `[:, 0]`) stay lazy.

    Args:
        first: A tensor, a NumPy array, or a view of some rows of one.
        second: Another with rows of the same shape.
    """

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the concatenated array."""
        return (len(self), *(int(extent) for extent in self.first.shape[1:]))

    @property
    def dtype(self) -> Any:
        """Element type."""
        return self.first.dtype

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return int(self.first[:1].nbytes) // max(int(np.prod(self.shape[1:], dtype=np.int64)), 1)

    @property
    def nbytes(self) -> int:
        """Size of these rows in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.itemsize

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, key: Any) -> Any:
        head, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(head, slice):
            if head == slice(None):
                return JoinedRows(self.first[(head, *rest)], self.second[(head, *rest)])
            return self[np.arange(*head.indices(len(self)))][(slice(None), *rest)]
        rows = np.asarray(head)
        if rows.ndim == 0:
            row, before = range(len(self))[int(rows)], len(self.first)
            return self.first[(row, *rest)] if row < before else self._cast(self.second[(row - before, *rest)])
        rows = np.where(rows < 0, rows + len(self), rows)
        chunks, places = [], []
        for side, start, mine in (
            (self.first, 0, rows < len(self.first)),
            (self.second, len(self.first), rows >= len(self.first)),
        ):
            others = [each[mine] if isinstance(each, np.ndarray) else each for each in map(_as_index, rest)]
            chunks.append(self._cast(side[(rows[mine] - start, *others)]))
            places.append(np.flatnonzero(mine))
        back = np.argsort(np.concatenate(places))
        return torch.cat(chunks)[back] if isinstance(chunks[0], Tensor) else np.concatenate(chunks)[back]

    def _cast(self, values: Any) -> Any:
        return values.to(self.dtype) if isinstance(values, Tensor) else np.asarray(values, dtype=self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[np.arange(len(self))], dtype=dtype)


def _as_index(index: Any) -> Any:
    """Converts index arrays to NumPy; numbers and slices are unchanged."""
    return np.asarray(index) if isinstance(index, Tensor | np.ndarray) and index.ndim else index


def join_rows(first: Any, second: Any) -> Any:
    """Concatenates rows: copies small arrays, joins large ones lazily."""
    if len(first) * first[:1].nbytes >= _LAZY_FROM:
        return JoinedRows(first, second)
    if isinstance(first, Tensor):
        return torch.cat([first, torch.as_tensor(second).to(first.dtype)])
    return np.concatenate([np.asarray(first), np.asarray(second, dtype=first.dtype)])


def _read(array: Any, rows: NDArray[np.intp]) -> Any:
    """Copies rows, with the dimensions of `rows`."""
    flat = rows.reshape(-1)
    values = array[torch.from_numpy(flat) if isinstance(array, Tensor) else flat]
    return values.reshape(*rows.shape, *(int(extent) for extent in array.shape[1:]))


def gather_rows(array: Any, rows: NDArray[np.intp]) -> Any:
    """Gathers rows, with the dimensions of `rows`: contiguous rows are a view, few are copied, others a `RowView`."""
    flat = rows.reshape(-1)
    if isinstance(array, Tensor) and len(flat) and np.array_equal(flat, np.arange(flat[0], flat[0] + len(flat))):
        block = array[int(flat[0]) : int(flat[0]) + len(flat)]
        return block.reshape(*rows.shape, *array.shape[1:]) if rows.ndim > 1 else block
    if rows.size * int(np.prod(array.shape[1:], dtype=np.int64)) * int(array.itemsize) >= _LAZY_FROM:
        return RowView(array, rows)
    return _read(array, rows)


def announce_size(log: Callable[[str], None], what: str, size: int, folder: Path) -> None:
    """Logs the disk space that something will need before it is built, and how much is free."""
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    log(f"{what}: {_bytes(size)} in {folder}; {_bytes(free)} of disk space are free")


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
