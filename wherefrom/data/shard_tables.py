"""Shards of a folder, and what the Parquet files beside them, or else the shards themselves, name of their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wherefrom.data.image_metadata import shown
from wherefrom.data.shards import check_shard, first_kinds, image_kinds, list_samples
from wherefrom.runtime.artifacts import hash_file, identity_hash


@dataclass(frozen=True)
class Shard:
    """A shard of a folder.

    Attributes:
        path: The tar file.
        name: Its path below the folder.
    """

    path: Path
    name: str

    @property
    def table(self) -> Path | None:
        """The Parquet file beside it, which img2dataset writes, if there is one."""
        path = self.path.with_suffix(".parquet")
        return path if path.is_file() else None

    @property
    def prefix(self) -> str:
        """What stands before its keys in ids: keys of shards in two folders may be the same."""
        return self.name.rpartition("/")[0] + "/" if "/" in self.name else ""

    def read_table(self, columns: Sequence[str]) -> dict[str, list[Any]] | None:
        """Columns of the Parquet file, and `key` and `status` if present; None without one.

        Raises:
            ValueError: The file cannot be read, or lacks a column.
        """
        return None if self.table is None else _read_table(self.table, columns)

    def keys(self, columns: Sequence[str]) -> list[str]:
        """The keys that it should hold; img2dataset also lists failed downloads.

        Raises:
            ValueError: The Parquet file cannot be used.
        """
        table = self.read_table(columns)
        if table is None:
            return list(dict.fromkeys(key for key, _ in list_samples(self.path)))
        states = table.get("status", ["success"] * len(table["key"]))
        return [str(key) for key, status in zip(table["key"], states, strict=True) if status == "success"]

    def content(self, keys: Sequence[str]) -> str:
        """Hash of the Parquet file, or of the keys of a shard without one."""
        return identity_hash({"keys": list(keys)}) if self.table is None else hash_file(self.table)

    def check_kinds(self, image: str | None) -> None:
        """Refuses a shard whose samples do not say which of their members is the image, by its first sample.

        Args:
            image: The kind that is asked for.

        Raises:
            ValueError: Several could be, or the one that is asked for is not there.
        """
        kinds = first_kinds(self.path)
        found = image_kinds(kinds)
        if image is None and len(found) > 1:
            raise ValueError(
                f"{self.path}: each sample holds {len(found)} images ({shown(found)}). Name the one that the model was "
                "trained on in the option 'image', such as " + f"{found[0]}."
            )
        if image is not None and kinds and image not in kinds:
            raise ValueError(
                f"{self.path}: its first sample has no member {image!r} (the option 'image'), only "
                f"{shown(sorted(kinds))}."
            )


def find_shards(folder: Path) -> list[Shard]:
    """Finds the shards in a folder and below it, sorted by path.

    Raises:
        ValueError: There is none, or one is empty.
    """
    paths = sorted(folder.glob("**/*.tar"), key=lambda path: path.relative_to(folder).as_posix())
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ValueError(
            f"{folder} holds no shard. Give a folder of tar files in WebDataset's layout, such as the output folder of "
            "img2dataset (--output_format webdataset)."
        )
    for path in paths:
        check_shard(path)
    return [Shard(path, path.relative_to(folder).as_posix()) for path in paths]


def _read_table(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in ("key", *columns) if name not in names]
            if missing:
                raise ValueError(
                    f"{path} has no column {missing[0]!r}, only {', '.join(map(repr, names))}. Name columns that it "
                    "has in the option 'columns' and the option 'license'; 'key' must be there. (Without the file, "
                    "keys are read from the shard, and columns from its JSON members.)"
                )
            wanted = list(dict.fromkeys(("key", *columns, *(name for name in ("status",) if name in names))))
            table: dict[str, list[Any]] = file.read(columns=wanted).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({error}). Download it again.") from error
    return table
