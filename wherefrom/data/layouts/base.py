"""The interface of readers: what a layout says of a place on disk, and the rows that it reads there.

Everything that is read is untrusted: a row never names a file outside of the folder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, Protocol

from wherefrom.data.split_names import split_named
from wherefrom.runtime.artifacts import hash_file, identity_hash

SPLITS = ("train", "validation", "test")
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".ppm", ".pgm")
)
CaptionLines = Literal["each", "first", "whole"]
_ALTERNATIVES = 60  # captions of an image, after images with fewer repeat theirs


@dataclass(frozen=True)
class Row:
    """One image of a data set, before it is decoded.

    Attributes:
        where: Where it is named, such as a file and a line, for errors.
        name: The image's path below the folder, or what else tells it from the others.
        id: The column `id`, or else `name`.
        captions: At least one.
        split: One of `SPLITS`, or '' in a data set without splits.
        columns: The other columns, with `file_name` and `license`.
        repeats: How often an epoch of training sees the image.
    """

    where: str
    name: str
    id: str
    captions: tuple[str, ...]
    split: str
    columns: Mapping[str, str]
    repeats: int = 1


@dataclass(frozen=True)
class ReadingOptions:
    """What a reader is asked for.

    Attributes:
        layout: Name of the layout; None finds it out.
        caption: Name of the caption column, or suffix of the caption files, such as `.txt`; None finds it out.
        columns: Further columns to keep (`license` always is); None keeps all.
        one_caption: The caption of all images of a folder that holds no captions.
        trigger: What stands for `[trigger]` in captions.
        caption_lines: What the lines of a caption file are: `each` a caption of its own, the `first` the only one, or
            the `whole` one caption; None is the layout's own.
        image_column: Name of the column of images, in a table that has several.
        cache: Folder of the store, for what is downloaded; it decides nothing that is read.

    Raises:
        ValueError: An unknown choice.
    """

    layout: str | None = None
    caption: str | None = None
    columns: tuple[str, ...] | None = None
    one_caption: str | None = None
    trigger: str | None = None
    caption_lines: CaptionLines | None = None
    image_column: str | None = None
    cache: str | Path = "cache"

    def __post_init__(self) -> None:
        checked_lines(self.caption_lines)


def checked_lines(lines: str | None) -> CaptionLines | None:
    """What the lines of a caption file are; None, or "", where nothing is said.

    Raises:
        ValueError: An unknown choice.
    """
    if not lines:
        return None
    known: dict[str, CaptionLines] = {"each": "each", "first": "first", "whole": "whole"}
    if lines not in known:
        raise ValueError(f"caption_lines is one of {', '.join(known)}; given {lines!r}.")
    return known[lines]


@dataclass(frozen=True)
class Place:
    """What the user named: a folder, a file, or a name that only some layouts know.

    Attributes:
        given: As it was given.
    """

    given: str

    @property
    def path(self) -> Path:
        """The place as a path, which need not exist."""
        return Path(self.given)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Paths below the folder of all its files, sorted; hidden ones and linked folders are left out."""
        found: list[str] = []
        for place, folders, files in os.walk(self.path):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
            below = Path(place).relative_to(self.path)
            found += [(below / name).as_posix() for name in files if not name.startswith(".")]
        return tuple(sorted(found))

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Those of its files that are images by their suffix."""
        return tuple(name for name in self.files if PurePosixPath(name).suffix.lower() in SUFFIXES)

    @cached_property
    def linked_folders(self) -> tuple[str, ...]:
        """Paths below the folder of links to folders, which are not followed."""
        found = []
        for place, folders, _ in os.walk(self.path):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
            links = [Path(place) / name for name in folders if (Path(place) / name).is_symlink()]
            found += [path.relative_to(self.path).as_posix() for path in links]
        return tuple(found)


class ImageReader(Protocol):
    """The rows of a place, and the bytes of their images."""

    @property
    def layout(self) -> str:
        """Name of the layout."""
        ...

    @property
    def caption(self) -> str | None:
        """The caption column or suffix that was taken."""
        ...

    @property
    def rows(self) -> Sequence[Row]:
        """The images, sorted by id; ids are unique and all have equally many captions."""
        ...

    @property
    def lines(self) -> Sequence[str]:
        """What the user is told about them."""
        ...

    def open_image(self, row: Row) -> Path | BinaryIO:
        """The file of a row's image, or a stream of its bytes."""
        ...

    def content_key(self, row: Row) -> str:
        """A hash of the bytes of a row's image."""
        ...

    def metadata_hashes(self) -> Mapping[str, str]:
        """What decides the rows, for the identity: name -> hash."""
        ...


@dataclass(frozen=True)
class Found:
    """Why a place is of a layout.

    Attributes:
        why: Continues "reads FOLDER as LAYOUT (…)".
        whole: Whether the layout has a caption for every image, so that another one's would contradict it.
    """

    why: str
    whole: bool = True


class Layout(Protocol):
    """One way in which images and captions lie on disk.

    Attributes:
        name: What the option `layout` calls it.
        needs: What a place of this layout holds, for errors.
        contains: Layouts whose captions this one reads too, so that a place of both is no contradiction.
        takes: Of the options `one_caption`, `trigger` and `caption_lines` those that change what it reads.
    """

    name: str
    needs: str
    contains: frozenset[str]
    takes: frozenset[str]

    def find(self, place: Place, options: ReadingOptions) -> Found | None:
        """Whether a place is of this layout, and why; a glance, which raises nothing."""
        ...

    def read(self, place: Place, options: ReadingOptions) -> ImageReader:
        """The rows of a place.

        Raises:
            ValueError: The place is not of this layout, or something there cannot be used.
        """
        ...


@dataclass(frozen=True)
class FileReader:
    """Rows whose images are files below one folder.

    Attributes:
        layout: See `ImageReader`.
        rows: See `ImageReader`.
        folder: The folder that the names of the rows are relative to.
        caption: See `ImageReader`.
        lines: See `ImageReader`.
        hashes: See `metadata_hashes`; None hashes the rows.
    """

    layout: str
    rows: Sequence[Row]
    folder: Path
    caption: str | None = None
    lines: Sequence[str] = ()
    hashes: Mapping[str, str] | None = field(default=None, compare=False)

    def open_image(self, row: Row) -> Path:
        """The file of a row's image."""
        return self.folder / row.name

    def content_key(self, row: Row) -> str:
        """A hash of the file's bytes."""
        try:
            return hash_file(self.folder / row.name)
        except OSError:
            return "unreadable"  # loading it raises the reason

    def metadata_hashes(self) -> Mapping[str, str]:
        """Those of the metadata files, or one of all rows."""
        return {"rows": rows_hash(self.rows)} if self.hashes is None else self.hashes


def image_row(name: str, captions: tuple[str, ...], *, where: str = "", repeats: int = 1) -> Row:
    """The row of an image file of which nothing is known but its captions.

    Args:
        name: Its path below the folder, which is its id too.
        captions: At least one.
        where: Where it is named; its own name where nothing else names it.
        repeats: How often an epoch of training sees it.
    """
    return Row(where or name, name, name, captions, "", {"file_name": name, "license": "unknown"}, repeats)


def rows_hash(rows: Sequence[Row]) -> str:
    """Hashes everything that rows say, but not where they say it."""
    said = [[row.id, row.name, list(row.captions), row.split, dict(row.columns), row.repeats] for row in rows]
    return identity_hash({"rows": said})


def shown(names: Sequence[str]) -> str:
    """Formats a few of the names, for errors."""
    return ", ".join(repr(name) for name in names[:5]) + (", …" if len(names) > 5 else "")


def counted(number: int, what: str) -> str:
    """A number of things, in words."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def inside(folder: Path, path: Path) -> bool:
    """Whether a path lies in a folder once links are resolved, so that no row exposes a file from elsewhere."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def check_inside(folder: Path, names: Collection[str]) -> None:
    """Refuses files that are links out of their folder.

    Raises:
        ValueError: A file leads out of the folder.
    """
    for name in names:
        if not inside(folder, folder / name):
            raise ValueError(f"{folder / name} is a link that leads out of {folder}. Put the file itself there.")


def finished_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows sorted by id, with equally many captions each.

    An image with fewer captions repeats them, up to the least common multiple: each is drawn as often as before, and
    means over captions are the same.

    Raises:
        ValueError: Two have the same id, or there would be too many captions.
    """
    seen: dict[str, Row] = {}
    for row in rows:
        other = seen.setdefault(row.id, row)
        if other is not row:
            raise ValueError(
                f"{other.where} and {row.where} have the same id {row.id!r}. Ids must be unique; several captions of "
                "one image go into one row, as a list."
            )
    several = sorted({len(row.captions) for row in rows})
    common = math.lcm(*several) if several else 1
    if common > _ALTERNATIVES:
        fewest = next(row for row in rows if len(row.captions) == several[0])
        most = next(row for row in rows if len(row.captions) == several[-1])
        raise ValueError(
            f"{most.where}: the image has {counted(len(most.captions), 'caption')}, that of {fewest.where} has "
            f"{len(fewest.captions)}: to give each image equally many, {common} of each would be needed, and "
            f"{_ALTERNATIVES} is the limit. Give every image equally many captions."
        )
    made = [
        row if len(row.captions) == common else replace(row, captions=row.captions * (common // len(row.captions)))
        for row in rows
    ]
    return sorted(made, key=lambda row: row.id)


def with_folder_splits(folder: Path, rows: Sequence[Row]) -> tuple[list[Row], dict[str, str]]:
    """Completes missing splits from the top-level folder, as Hugging Face does; all rows or none have a split.

    Args:
        folder: The folder, for errors.
        rows: The rows, whose names are paths below the folder.

    Returns:
        The rows, and the splits of those folders that are not called as the split is.

    Raises:
        ValueError: Some rows have a split and others have none, or folders leave the split in doubt.
    """
    without = [row for row in rows if not row.split]
    if not without:
        return list(rows), {}
    if len(without) < len(rows):
        raise ValueError(f"{without[0].where}: the split is missing, while other images have one. Write it.")
    tops = {PurePosixPath(row.name).parts[0] if "/" in row.name else "" for row in rows}
    named = {top: split_named(top) or "" for top in tops}
    if all(named.values()):
        made = [replace(row, split=named[PurePosixPath(row.name).parts[0]]) for row in rows]
        return made, {top: split for top, split in named.items() if top != split}
    doubtful = sorted(top for top, split in named.items() if split in ("validation", "test"))
    if doubtful:  # but a lone folder `train` may hold images of trains
        raise ValueError(
            f"{folder} has images in {shown(doubtful)} and others beside them, so their split is in doubt. "
            f"Add a column 'split' ({', '.join(SPLITS)}), or give the folders other names."
        )
    return list(rows), {}
