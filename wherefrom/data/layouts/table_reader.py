"""Rows of images that lie in tables, with their captions in columns: what parquet and Arrow data sets share."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from wherefrom.data.layouts.base import SPLITS, ReadingOptions, Row, counted, finished_rows, rows_hash, shown
from wherefrom.data.layouts.table_columns import TableColumns, as_text, captions_of, columns_of, is_missing
from wherefrom.data.layouts.table_files import ImageColumn, TableFile, encoded_bytes
from wherefrom.data.split_names import split_named


@dataclass(frozen=True)
class _Cells:
    """One row of a table: where it is, the hash of its image, the path that goes with it, and the other cells."""

    file: int
    row: int
    key: str
    path: str
    cells: Mapping[str, Any]


@dataclass(frozen=True)
class TableReader:
    """Rows of tables, an `ImageReader`.

    Attributes:
        layout: See `ImageReader`.
        caption: See `ImageReader`.
        rows: See `ImageReader`.
        lines: See `ImageReader`.
        images: The encoded images.
        places: Name of a row -> file, row in the file, and hash of the image.
    """

    layout: str
    caption: str
    rows: Sequence[Row]
    lines: Sequence[str]
    images: ImageColumn = field(repr=False)
    places: Mapping[str, tuple[int, int, str]] = field(repr=False)

    def open_image(self, row: Row) -> io.BytesIO:
        """The encoded image of a row."""
        file, number, _ = self.places[row.name]
        return io.BytesIO(self.images.at(file, number))

    def content_key(self, row: Row) -> str:
        """A hash of the encoded image."""
        return self.places[row.name][2]

    def metadata_hashes(self) -> Mapping[str, str]:
        """One of all rows."""
        return {"rows": rows_hash(self.rows)}


def read_tables(
    layout: str, where: str, files: Sequence[TableFile], options: ReadingOptions, parts: Sequence[str] = ()
) -> TableReader:
    """Reads all rows but their images, which are hashed one after the other.

    The id is the column `id`, or else the path that goes with each image where all have one and no two the same, or
    else file and row.

    Args:
        layout: Name of the layout.
        where: What the user named, for errors.
        files: The tables, in the order of their rows.
        options: What to read.
        parts: What the tables are parts of, by names that may be those of splits.

    Raises:
        ValueError: A table cannot be read, lacks a column or an image, or two images have one id.
    """
    plans = [
        columns_of(file.schema, file.name, image=options.image_column, caption=options.caption, columns=options.columns)
        for file in files
    ]
    first = plans[0]
    for plan, file in zip(plans, files, strict=True):
        if (plan.image, plan.caption) != (first.image, first.caption):
            raise ValueError(
                f"{where}: {file.name} has images in {plan.image!r} and captions in {plan.caption!r}, {files[0].name} "
                f"has them in {first.image!r} and {first.caption!r}. Name both in the options "
                "'image_column' and 'caption'."
            )
    every = [
        cells
        for number, (file, plan) in enumerate(zip(files, plans, strict=True))
        for cells in _cells(number, file, plan)
    ]
    if not every:
        raise ValueError(f"{where} lists no image: its tables have no rows.")
    paths = [PurePosixPath(cells.path).name for cells in every]
    by_path = all(paths) and len(set(paths)) == len(paths) and all(_is_id(path) for path in paths)
    rows = [
        _row(cells, files, plans[cells.file], path if by_path else "") for cells, path in zip(every, paths, strict=True)
    ]
    rows = _with_splits(where, rows)
    places = {row.name: (cells.file, cells.row, cells.key) for row, cells in zip(rows, every, strict=True)}
    made = finished_rows(rows)
    order = [places[row.name][:2] for row in made]
    images = ImageColumn(files, first.image, order == sorted(order))
    lines = _lines(made, plans, first)
    unknown = sorted({part for part in parts if split_named(part) is None})
    if len(unknown) > 1 and not made[0].split:
        lines.append(f"takes all of {shown(unknown)} as training images: these are no names of splits")
    return TableReader(layout, first.caption, made, lines, images, places)


def _cells(number: int, file: TableFile, plan: TableColumns) -> Iterator[_Cells]:
    """The rows of a table; of its images only their hashes are kept."""
    row = 0
    for batch in file.batches([plan.image, *plan.read]):
        images, others = batch.column(0), batch.drop_columns([plan.image]).to_pylist()
        for image, cells in zip(images, others, strict=True):
            value = image.as_py()
            encoded = encoded_bytes(value)
            path = value.get("path") if isinstance(value, dict) else None
            if encoded is None:
                raise ValueError(
                    f"{file.name}, row {row}: the image ({plan.image!r}) is "
                    + (
                        f"only named, as {path!r}, and files that a table names are not read. Save the data set with "
                        "its images in it: `Dataset.save_to_disk` and `to_parquet` do."
                        if path
                        else "missing. Take the row out."
                    )
                )
            digest = hashlib.blake2b(encoded, digest_size=16).hexdigest()
            yield _Cells(number, row, digest, path if isinstance(path, str) else "", cells)
            row += 1


def _is_id(name: str) -> bool:
    return bool(name) and "\0" not in name and name.splitlines() == [name] and name.isprintable()


def _row(cells: _Cells, files: Sequence[TableFile], plan: TableColumns, path: str) -> Row:
    file = files[cells.file]
    where, name = f"{file.name}, row {cells.row}", f"{file.name}:{cells.row:09d}"
    values = {column: as_text(cells.cells[column], plan.labels.get(column)) for column in plan.kept}
    chosen = path or name
    if "id" in values:
        chosen = values.pop("id")
        if is_missing(chosen) or isinstance(cells.cells["id"], bool | float) or not _is_id(chosen):
            raise ValueError(
                f"{where}: the id {chosen!r} is not valid. Give each image its own, or drop the column 'id'."
            )
    said = values.pop("split", "")
    split = (split_named(said) or said) if said else file.split
    if split not in ("", *SPLITS):
        raise ValueError(f"{where}: the split {split!r} is not one of {', '.join(SPLITS)}. Rename it.")
    values["file_name"] = values.get("file_name") or path or name
    values["license"] = values.get("license") or "unknown"
    return Row(where, name, chosen, captions_of(cells.cells[plan.caption], plan.caption), split, values)


def _with_splits(where: str, rows: Sequence[Row]) -> list[Row]:
    """The rows, all or none of which have a split."""
    without = [row for row in rows if not row.split]
    if without and len(without) < len(rows):
        other = next(row for row in rows if row.split)
        raise ValueError(
            f"{where}: {without[0].where} has no split, while {other.where} is of {other.split!r}. Name the files as "
            f"`datasets` does ({', '.join(f'{split}-00000-of-00001.parquet' for split in SPLITS)}), or read one "
            "of them."
        )
    return list(rows)


def _lines(rows: Sequence[Row], plans: Sequence[TableColumns], first: TableColumns) -> list[str]:
    lines = [f"takes the images from the column {first.image!r} and the captions from {first.caption!r}"]
    left = sorted({name for plan in plans for name in plan.left})
    if left:
        lines.append(f"leaves out columns that are neither text nor numbers: {shown(left)}")
    empty = sum(not any(row.captions) for row in rows)
    if empty:
        lines.append(f"{counted(empty, 'image')} of {len(rows):,} without a caption, which are taken as ''")
    return lines
