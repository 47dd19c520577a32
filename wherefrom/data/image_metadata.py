"""Metadata files of a folder of captioned images, in Hugging Face's `imagefolder` layout.

Either the folder holds one metadata file (`metadata.jsonl`, `.csv` or `.parquet`), or its subfolders `train`,
`validation` and `test` (or `val`, `testing`, …) hold one each. `file_name` is relative to the metadata file. Everything
in the folder is untrusted.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wherefrom.data.layouts.base import SPLITS, SUFFIXES, Row, counted, finished_rows, inside, with_folder_splits
from wherefrom.data.layouts.base import shown as shown
from wherefrom.data.split_names import split_named

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Columns that are looked for, in this order, where none is named.
CAPTION_COLUMNS = ("text", "caption", "prompt", "captions", "tags")
_CELL_LIMIT = 2**31 - 1  # the csv module rejects cells above 128 KiB by default
_Cells = tuple[str, dict[str, Any]]  # where the row stands, for errors; its cells


@dataclass
class Metadata:
    """What a folder's metadata say.

    Attributes:
        rows: The images.
        caption: Column that the captions are from.
        lines: What the user is told.
        also: What else than the metadata files' bytes decides the rows, where it is not as it always was.
    """

    rows: list[Row] = field(default_factory=list)
    caption: str = ""
    lines: list[str] = field(default_factory=list)
    also: dict[str, str] = field(default_factory=dict)


def metadata_files(folder: Path) -> dict[Path, str]:
    """Finds metadata files; maps each to the split whose subfolder it lies in, or ''.

    Raises:
        ValueError: There is none, or more than one for the same images.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Give the folder that holds the images and their metadata file.")
    found: dict[Path, str] = {}
    for place, split in (("", ""), *split_folders(folder).items()):
        files = [folder / place / name for name in METADATA if (folder / place / name).is_file()]
        if len(files) > 1:
            names = shown([path.name for path in files])
            raise ValueError(f"{folder / place} holds {len(files)} metadata files ({names}). Keep one.")
        found.update(dict.fromkeys(files, split))
    if not found:
        raise ValueError(
            f"{folder} holds no metadata file. Add {', '.join(METADATA[:-1])} or {METADATA[-1]} with a column "
            f"'file_name' and a caption column, there or in each of its subfolders {', '.join(SPLITS)}."
        )
    if "" in found.values() and len(found) > 1:
        raise ValueError(
            f"{folder} holds a metadata file and so do its subfolders ({shown([str(f) for f in found])}). "
            "Keep the one above, with a column 'split', or those below."
        )
    return found


def split_folders(folder: Path) -> dict[str, str]:
    """Names of the subfolders that are called as a split is, in any case, each with its split."""
    names = sorted(path.name for path in folder.iterdir() if split_named(path.name) and path.is_dir())
    return {name: split_named(name) or "" for name in names}


def _read_jsonl(path: Path) -> Iterator[_Cells]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number} is not valid JSON ({error}). Write one object a line."
                ) from error
            if not isinstance(cells, dict):
                raise ValueError(f"{path}, line {number} is not a JSON object. Write one object a line.")
            yield f"{path}, line {number}", cells


def _read_csv(path: Path) -> Iterator[_Cells]:
    limit = csv.field_size_limit(_CELL_LIMIT)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: two columns have the same name ({shown(header)}). Rename one.")
            for cells in reader:
                where = f"{path}, line {reader.line_num}"
                if cells and len(cells) != len(header):
                    raise ValueError(
                        f"{where} has {len(cells)} cells, but the header names {len(header)}. "
                        "Put cells that hold commas between double quotes."
                    )
                if cells:
                    yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} is not valid CSV ({error}). Write it again, in UTF-8 with commas.") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, wanted: Callable[[str], bool]) -> Iterator[_Cells]:
    try:
        with pq.ParquetFile(path) as file:
            # Only the wanted columns: the others may hold whole images.
            names = [name for name in file.schema_arrow.names if wanted(name)]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=names):
                for cells in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", cells
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({error}). Write it again.") from error


def _read(path: Path, caption: str | None, columns: Collection[str] | None, told: Metadata) -> tuple[str, list[_Cells]]:
    """The caption column of a metadata file, and its rows with the wanted columns only."""
    looked_for = CAPTION_COLUMNS if caption is None else (caption,)

    def wanted(name: str) -> bool:
        return columns is None or name in {"file_name", "id", "split", "license", *looked_for, *columns}

    try:
        if path.suffix == ".parquet":
            rows = list(_read_parquet(path, wanted))
        else:
            rows = list(_read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    if not rows:
        raise ValueError(f"{path} lists no image. Add one row an image.")
    present = {name for _, cells in rows for name in cells}
    there = [name for name in looked_for if name in present]
    taken = there[0] if there else looked_for[0]
    for column, remedy in (
        ("file_name", "Add one, with each image's path relative to the metadata file."),
        (taken, "Add one, or name the caption column in the option 'caption'."),
        *((name, "Take it out of the option 'columns'.") for name in columns or ()),
    ):
        if column not in present:
            raise ValueError(f"{path} has no column {column!r}, only {shown(sorted(present))}. {remedy}")
    if taken != CAPTION_COLUMNS[0] and caption is None:
        told.lines.append(f"takes the captions from the column {taken!r} of {path.name}")
    for other in there[1:]:
        unlike = sum(not _same_caption(cells.get(taken), cells.get(other)) for _, cells in rows)
        if unlike:
            told.lines.append(
                f"{path.name} has the columns {taken!r} and {other!r}, which differ for {counted(unlike, 'image')}: "
                f"takes {taken!r}; another one is named in the option 'caption'"
            )
    # The name `captions` is that of the captions themselves wherever images are kept.
    kept = {name for name in present if (columns is None and name != "captions") or name in (columns or ())}
    names = sorted({name for name in ("file_name", "id", "split", "license", taken) if name in present} | kept)
    return taken, [(where, {name: cells.get(name) for name in names}) for where, cells in rows]


def _same_caption(one: Any, other: Any) -> bool:
    """Whether two cells say the same, a list of tags being the tags with commas."""
    texts = [", ".join(str(each) for each in cell) if isinstance(cell, list) else cell for cell in (one, other)]
    return texts[0] == texts[1] or (_missing(one) and _missing(other))


def _missing(cell: Any) -> bool:
    return (
        cell is None or (isinstance(cell, float) and math.isnan(cell)) or (isinstance(cell, str) and not cell.strip())
    )


def _text(cell: Any, where: str, column: str, remedy: str) -> str:
    """Converts a cell to text; numbers are formatted, so that numeric ids work."""
    if isinstance(cell, bool | int | float):
        return str(cell)
    if not isinstance(cell, str):
        raise ValueError(f"{where}: {column!r} holds a {type(cell).__name__}, not text. {remedy}")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {column!r} holds half a surrogate pair ({error}). Write it as UTF-8.") from error
    return cell


def _captions(cell: Any, where: str, column: str, told: Metadata) -> tuple[str, ...]:
    """The captions of a cell. An empty one is a caption: the image was trained on without words; None is missing."""
    several = cell if isinstance(cell, list) else [cell]
    if not several or any(_missing(one) and not isinstance(one, str) for one in several):
        raise ValueError(
            f"{where}: the caption ({column!r}) is missing. Write one, which may be empty, or take the image out of "
            "the folder."
        )
    remedy = "A caption is a string, or a list of strings."
    made = tuple("" if _missing(one) else _text(one, where, column, remedy) for one in several)
    if column == "tags" and isinstance(cell, list):
        told.also["tags"] = "joined"
        return (", ".join(made),)
    return made


def _file(folder: Path, base: Path, cell: Any, where: str) -> str:
    """Resolves a row's image file to its path below the folder."""
    if _missing(cell):
        raise ValueError(f"{where}: 'file_name' is missing. Write the image's path relative to the metadata file.")
    name = PurePosixPath(_text(cell, where, "file_name", "It is a path."))
    if "\0" in str(name):
        raise ValueError(f"{where}: the file name {str(name)!r} holds a NUL character. Correct it.")
    path = base / name
    if name.is_absolute() or ".." in name.parts or not inside(folder, path):
        raise ValueError(
            f"{where}: {str(name)!r} leads out of {folder}, or could. Put the image itself into the folder and give "
            "its relative path, without '..'."
        )
    if not os.path.isfile(path):  # noqa: PTH113  Path.is_file raises where a name is too long for the disk
        raise ValueError(f"{where}: there is no file {str(name)!r} in {base}. Add the image or remove the row.")
    return path.relative_to(folder).as_posix()


def _id(cell: Any, where: str) -> str:
    if _missing(cell) or isinstance(cell, bool | float):
        raise ValueError(f"{where}: the id {cell!r} is not valid. Give each image its own, or drop the column 'id'.")
    name = _text(cell, where, "id", "An id is a string.")
    if "\0" in name or name.splitlines() != [name]:
        raise ValueError(f"{where}: the id {name!r} holds a NUL character or a line break. Rename it.")
    return name


def _split(cell: Any, place: str, where: str) -> str:
    split = place if _missing(cell) else (split_named(cell) or cell if isinstance(cell, str) else cell)
    if place not in ("", split):
        raise ValueError(f"{where}: the split {split!r} is not that of its folder, {place!r}. Correct the row.")
    if split not in ("", *SPLITS):
        raise ValueError(f"{where}: the split {split!r} is not one of {', '.join(SPLITS)}. Rename it.")
    return str(split)


@dataclass(frozen=True)
class _File:
    """One metadata file: the folder that it lies in, the split of that folder, and its caption column."""

    folder: Path
    path: Path
    place: str
    caption: str


def _row(file: _File, where: str, cells: dict[str, Any], told: Metadata) -> Row:
    name = _file(file.folder, file.path.parent, cells.pop("file_name", None), where)
    captions = _captions(cells.pop(file.caption, None), where, file.caption, told)
    chosen = _id(cells.pop("id", name), where)
    split = _split(cells.pop("split", None), file.place, where)
    if "captions" in cells:
        raise ValueError(
            f"{where}: there is a column 'captions' beside {file.caption!r}. Name it in the option 'caption', or leave "
            "it out of the option 'columns'."
        )
    remedy = "Name the columns to keep in the option 'columns'."
    columns = {key: "" if _missing(cell) else _cell(cell, where, key, remedy) for key, cell in cells.items()}
    columns |= {"file_name": name, "license": columns.get("license") or "unknown"}
    return Row(where, name, chosen, captions, split, columns)


def _cell(cell: Any, where: str, column: str, remedy: str) -> str:
    """A further column's cell as text; captions that are not taken may be lists."""
    if column in CAPTION_COLUMNS and isinstance(cell, list) and all(isinstance(one, str) for one in cell):
        cell = ", ".join(cell)
    return _text(cell, where, column, remedy)


def _check(folder: Path, metadata: Collection[Path], rows: Sequence[Row]) -> None:
    """Validates all rows against the files on disk."""
    named = {row.name for row in rows}
    unnamed: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for path in (Path(place) / name for name in sorted(files) if not name.startswith(".")):
            if path.name in METADATA and path not in metadata:
                raise ValueError(
                    f"{path} would not be read: metadata files lie in {folder} or in {', '.join(SPLITS)} below it. "
                    "Move it."
                )
            name = path.relative_to(folder).as_posix()
            if path.suffix.lower() in SUFFIXES and name not in named:
                unnamed.append(name)
    if unnamed:
        raise ValueError(
            f"{folder} holds {len(unnamed)} images that no metadata names: {shown(unnamed)}. "
            "Add a row for each, or move them away."
        )


def read_metadata(folder: Path, caption: str | None, columns: Collection[str] | None) -> Metadata:
    """Reads the metadata of each image, sorted by id.

    Args:
        folder: The user's folder.
        caption: Name of the caption column; None takes the first of `CAPTION_COLUMNS` that is there.
        columns: Further columns to keep; None keeps all.

    Raises:
        ValueError: The metadata are invalid, or do not match the files on disk.
    """
    metadata, told = metadata_files(folder), Metadata()
    rows: list[Row] = []
    taken: list[str] = []
    for path, place in metadata.items():
        column, cells = _read(path, caption, columns, told)
        taken.append(column)
        file = _File(folder, path, place, column)
        rows += [_row(file, where, each, told) for where, each in cells]
    rows, renamed = with_folder_splits(folder, rows)
    if renamed:
        told.also["splits"] = json.dumps(renamed, sort_keys=True)
    rows = finished_rows(rows)
    _check(folder, metadata, rows)
    empty = [row.id for row in rows if not any(row.captions)]
    if empty:
        told.lines.append(f"{counted(len(empty), 'image')} of {len(rows):,} without a caption, which are taken as ''")
    told.rows, told.caption = rows, ", ".join(dict.fromkeys(taken))
    return told
