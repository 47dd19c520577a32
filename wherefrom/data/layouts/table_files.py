"""Files of tables that are read a few rows at a time: parquet, and Arrow as `datasets` keeps it."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from wherefrom.runtime.artifacts import storage_errors

_ROWS = 32  # images in memory at a time


class TableFile(Protocol):
    """A table on disk."""

    @property
    def name(self) -> str:
        """What errors, ids and rows call it: its path below the place that the user named."""
        ...

    @property
    def split(self) -> str:
        """What its name says of its split; '' is nothing."""
        ...

    @property
    def any_row(self) -> bool:
        """Whether a row is reached without reading those before it."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""
        ...

    def batches(self, columns: Sequence[str], start: int = 0) -> Iterator[pa.RecordBatch]:
        """These columns from a row on, a few rows at a time."""
        ...


@dataclass(frozen=True)
class ParquetTable:
    """A parquet file."""

    path: Path
    name: str
    split: str = ""
    any_row: bool = False

    @cached_property
    def schema(self) -> pa.Schema:
        """See `TableFile`."""
        try:
            return pq.read_schema(self.path)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    def batches(self, columns: Sequence[str], start: int = 0) -> Iterator[pa.RecordBatch]:
        """See `TableFile`."""
        try:
            # Without `pre_buffer` a column is read page by page, however large the row group.
            with pq.ParquetFile(self.path, buffer_size=2**20, pre_buffer=False) as file:
                first = 0
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if first + rows > start:
                        at = first
                        for batch in file.iter_batches(_ROWS, [group], list(columns), use_threads=False):
                            skip = max(0, start - at)
                            at += len(batch)
                            if skip < len(batch):
                                yield batch.slice(skip)
                    first += rows
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path} is not a readable parquet file ({error}). Write it again.")


@dataclass(frozen=True)
class ArrowTable:
    """A file in Arrow's streaming format, mapped into memory: `save_to_disk`, and the cache of `datasets`."""

    path: Path
    name: str
    split: str = ""
    any_row: bool = True

    @cached_property
    def _table(self) -> pa.Table:
        try:
            return pa.ipc.open_stream(pa.memory_map(str(self.path))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path} is not a readable Arrow file ({error}). Save the data set again.") from error

    @property
    def schema(self) -> pa.Schema:
        """See `TableFile`."""
        return self._table.schema

    def batches(self, columns: Sequence[str], start: int = 0) -> Iterator[pa.RecordBatch]:
        """See `TableFile`."""
        table = self._table.select(list(columns))
        for first in range(start, len(table), _ROWS):
            for batch in table.slice(first, _ROWS).to_batches():
                try:
                    batch.validate(full=True)  # offsets that lead elsewhere would read memory that is not the file's
                except pa.ArrowException as error:
                    raise ValueError(f"{self.path} is damaged ({error}). Save the data set again.") from error
                yield batch


def encoded_bytes(cell: Any) -> bytes | None:
    """The encoded image of a cell: the cell itself, or a struct's `bytes`."""
    value = cell.get("bytes") if isinstance(cell, dict) else cell
    return value if isinstance(value, bytes) and value else None


class ImageColumn:
    """The encoded images of tables, one at a time by file and row.

    Args:
        files: The tables.
        column: The column of images.
        in_order: Whether they will be asked for in the order of files and rows. Otherwise those of a file whose rows
            cannot be reached one by one are copied to a temporary file first.
    """

    def __init__(self, files: Sequence[TableFile], column: str, in_order: bool) -> None:
        self.files, self.column, self.in_order = files, column, in_order
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.Array | None = None
        self._file, self._first = -1, 0
        self._copied: dict[int, tuple[BinaryIO, list[int]]] = {}

    def at(self, file: int, row: int) -> bytes:
        """The image of a row; empty where there is none."""
        if not self.in_order and not self.files[file].any_row:
            return self._copy_of(file, row)
        held = 0 if self._batch is None else len(self._batch)
        if file != self._file or row < self._first or (self.files[file].any_row and row >= self._first + held):
            self._batches = self.files[file].batches([self.column], row)
            self._file, self._first, self._batch, held = file, row, None, 0
        while row >= self._first + held:
            self._first += held
            self._batch = next(self._batches).column(0)
            held = len(self._batch)
        assert self._batch is not None
        return encoded_bytes(self._batch[row - self._first].as_py()) or b""

    def _copy_of(self, file: int, row: int) -> bytes:
        if file not in self._copied:
            folder = Path(tempfile.gettempdir())
            with storage_errors(folder):
                stream: BinaryIO = tempfile.TemporaryFile(prefix="wherefrom-", dir=folder)  # noqa: SIM115  kept open
                ends = [0]
                for batch in self.files[file].batches([self.column]):
                    for cell in batch.column(0):
                        ends.append(ends[-1] + stream.write(encoded_bytes(cell.as_py()) or b""))
            weakref.finalize(self, stream.close)
            self._copied[file] = stream, ends
        stream, ends = self._copied[file]
        stream.seek(ends[row])
        return stream.read(ends[row + 1] - ends[row])
