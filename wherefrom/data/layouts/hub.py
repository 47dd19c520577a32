"""Data sets of Hugging Face's hub by their id, streamed once by the optional library `datasets` and kept as parquet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from wherefrom.data.layouts.base import Found, Place, ReadingOptions
from wherefrom.data.layouts.parquet import split_of_file
from wherefrom.data.layouts.table_files import ParquetTable
from wherefrom.data.layouts.table_reader import TableReader, read_tables
from wherefrom.runtime.artifacts import Store, replacing
from wherefrom.runtime.optional_dependencies import require_datasets

KIND = "hub_dataset"
_ROWS, _SHARD_BYTES = 32, 2**29
_ID = re.compile(
    r"(?P<owner>[A-Za-z0-9][\w.-]*)/(?P<name>[A-Za-z0-9][\w.-]*)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class HubId:
    """`OWNER/NAME`, `OWNER/NAME:CONFIGURATION`, `OWNER/NAME@REVISION` or all three.

    Attributes:
        repository: `OWNER/NAME`.
        config: One of the data set's configurations; None is its only one.
        revision: A commit, branch or tag; None is the newest.
    """

    repository: str
    config: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, given: str) -> HubId | None:
        """The id that was given, if it is one."""
        found = _ID.fullmatch(given)
        return found and cls(f"{found['owner']}/{found['name']}", found["config"], found["revision"])


class HubLayout:
    """A data set of the hub, which is downloaded once and then found in the store."""

    name = "hub"
    needs = "an id on Hugging Face's hub, OWNER/NAME, OWNER/NAME:CONFIGURATION or OWNER/NAME@REVISION"
    contains: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()

    def find(self, place: Place, options: ReadingOptions) -> Found | None:
        """By its form; what is on disk is never asked for on the hub."""
        return None if place.path.exists() or HubId.of(place.given) is None else Found("an id, and no folder here")

    def read(self, place: Place, options: ReadingOptions) -> TableReader:
        """The rows of all splits; see `read_tables`.

        Raises:
            ValueError: The data set cannot be had, or cannot be used.
            ImportError: `datasets` is not installed.
            StorageError: The store could not be written.
        """
        chosen = HubId.of(place.given)
        if chosen is None:
            raise ValueError(f"{place.given!r} is no id of the hub. The layout {self.name!r} needs {self.needs}.")
        store = Store(options.cache)
        identity = {"repository": chosen.repository, "config": chosen.config, "revision": chosen.revision}
        folder = store.make(KIND, identity, lambda partial: _download(chosen, partial))
        names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.parquet"))
        tables = [ParquetTable(folder / name, f"{place.given}/{name}", split_of_file(name)) for name in names]
        parts = [name.partition("/")[0] for name in names]
        made = read_tables(self.name, place.given, tables, options, parts)
        line = f"{place.given} is what was downloaded to {folder}; delete that folder to download it again"
        return TableReader(made.layout, made.caption, made.rows, [line, *made.lines], made.images, made.places)


def _download(chosen: HubId, folder: Path) -> dict[str, Any]:
    datasets = require_datasets(f"A data set of the hub ({chosen.repository})")
    try:
        # Version 4 and later run no code of a data set: those that come as a script are refused.
        found = datasets.load_dataset(chosen.repository, chosen.config, revision=chosen.revision, streaming=True)
        splits = write_splits(datasets, found, folder)
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError, OSError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"images: {chosen.repository!r} is neither a folder here nor a data set that could be had from the hub "
            f"({type(error).__name__}: {said[:300]}). Correct the path or the id, or download it on a machine that "
            "reaches the hub and give its folder of parquet files."
        ) from error
    return {"splits": splits}


def write_splits(datasets: Any, splits: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Writes streamed splits as parquet files with the images in them, a few rows at a time.

    Args:
        datasets: The library.
        splits: Name of a split -> its `IterableDataset`.
        folder: Where the files go.

    Returns:
        How many rows each has.

    Raises:
        StorageError: A file could not be written.
    """
    rows: dict[str, int] = {}
    for name, split in splits.items():
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"The split {name!r} has no name that a folder may have.")
        (folder / name).mkdir(parents=True, exist_ok=True)
        batches = iter(_arrow_batches(datasets, split))
        batch, number, rows[name] = next(batches, None), 0, 0
        schema = None if batch is None else batch.schema
        while batch is not None:
            size = 0
            file = folder / name / f"{number:05d}.parquet"
            with replacing(file) as temporary, pq.ParquetWriter(temporary, schema) as writer:
                while batch is not None and size < _SHARD_BYTES:
                    writer.write_table(batch.cast(schema))
                    size += batch.nbytes
                    rows[name] += len(batch)
                    batch = next(batches, None)
            number += 1
    return rows


def _arrow_batches(datasets: Any, split: Any) -> Any:
    """Tables of a few rows, with the images' bytes in them."""
    for column, feature in (split.features or {}).items():
        if isinstance(feature, datasets.Image):
            split = split.cast_column(column, datasets.Image(decode=False))
    for table in split.with_format("arrow").iter(batch_size=_ROWS):
        yield datasets.table.embed_table_storage(table)
