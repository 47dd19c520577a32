"""Parquet files with the images in them, as Hugging Face's hub keeps data sets."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from wherefrom.data.image_metadata import METADATA
from wherefrom.data.layouts.base import Found, Place, ReadingOptions, check_inside
from wherefrom.data.layouts.table_columns import image_columns
from wherefrom.data.layouts.table_files import ParquetTable
from wherefrom.data.layouts.table_reader import TableReader, read_tables
from wherefrom.data.split_names import split_named

_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+(-[0-9a-f]+)?")  # train-00000-of-00001-0123456789abcdef


def split_of_file(name: str) -> str:
    """The split in the name of a file or else a folder: `data/train-00000-of-00002.parquet`, `train/0000.parquet`."""
    path = PurePosixPath(name)
    shard = _SHARD.fullmatch(path.stem)
    named = [path.stem if shard is None else shard["split"], *reversed(path.parent.parts)]
    return next((split for part in named if (split := split_named(part))), "")


class ParquetLayout:
    """A parquet file, or a folder of them, with the images in a column."""

    name = "parquet"
    needs = (
        "a .parquet file, or a folder of them (data/train-00000-of-00001.parquet), with a column of images (a struct "
        "of bytes and path, or binary) and one of captions"
    )
    contains: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()

    def find(self, place: Place, options: ReadingOptions) -> Found | None:
        """The first parquet file, if it holds images."""
        for table in self._tables(place)[:1]:
            try:
                if image_columns(pq.read_schema(table.path)):
                    return Found(table.name)
            except (pa.ArrowException, OSError):
                # A file that was named is of this layout, and reading it says what is wrong.
                return Found(table.name) if place.path.is_file() else None
        return None

    def read(self, place: Place, options: ReadingOptions) -> TableReader:
        """The rows of all files; see `read_tables`."""
        tables = self._tables(place)
        if not tables:
            raise ValueError(f"{place.given} holds no parquet file. The layout {self.name!r} needs {self.needs}.")
        if place.path.is_dir():
            check_inside(place.path, [table.name for table in tables])
        shards = [_SHARD.fullmatch(PurePosixPath(table.name).stem) for table in tables]
        parts = [shard["split"] for shard in shards if shard is not None]
        return read_tables(self.name, place.given, tables, options, parts)

    @staticmethod
    def _tables(place: Place) -> list[ParquetTable]:
        """The parquet files that are not the metadata of images beside them."""
        if place.path.is_file():
            path = place.path
            return [ParquetTable(path, path.name)] if path.suffix.lower() == ".parquet" else []
        if not place.path.is_dir():
            return []
        names = [name for name in place.files if PurePosixPath(name).suffix.lower() == ".parquet"]
        names = [name for name in names if Path(name).name not in METADATA]
        return [ParquetTable(place.path / name, name, split_of_file(name)) for name in names]
