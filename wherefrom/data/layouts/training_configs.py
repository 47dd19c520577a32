"""Data set configurations in TOML, as kohya's sd-scripts and musubi-tuner are given them.

Settings of `[general]`, of a data set and of a subset are found in that order, the last one winning. What decides which
images are trained on, how often, and with which caption is taken; what changes captions or images at random during
training is said, for it is not replayed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from wherefrom.data.layouts.base import (
    FileReader,
    Found,
    Place,
    ReadingOptions,
    Row,
    check_inside,
    counted,
    finished_rows,
    shown,
)
from wherefrom.data.layouts.caption_files import lines_of, text_beside, with_trigger
from wherefrom.data.layouts.image_lists import list_rows
from wherefrom.data.layouts.kohya_captions import file_text
from wherefrom.data.layouts.left_out import TRAINED, untrained
from wherefrom.data.layouts.training_settings import Subset, said_of, subsets_of

REGULARIZATION = "is_reg"


@dataclass
class _Read:
    """The images so far, and what is said of them."""

    images: list[Row] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def _folder(base: Path, given: str, where: str) -> Path:
    """A folder or file that the configuration names: absolute, or relative to the configuration's own folder."""
    path = base / given
    if not path.exists():
        raise ValueError(
            f"{where}: there is no {given!r}{'' if Path(given).is_absolute() else f' in {base}'}. Paths are relative "
            "to the folder of the configuration."
        )
    return path


def _name(base: Path, path: Path) -> str:
    """An image's id: its path below the configuration's folder, or as it is."""
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.resolve().as_posix()


def _rows_of(subset: Subset, base: Path, options: ReadingOptions) -> tuple[list[Row], list[str]]:
    """The images of one subset, by their paths, each with its captions."""
    listed = subset.text("metadata_file") or subset.text("image_jsonl_file")
    given = subset.text("image_dir") or subset.text("image_directory")
    if not listed and not given:
        raise ValueError(f"{subset.where} has neither image_dir nor metadata_file.")
    if listed:
        path = _folder(base, listed, subset.where)
        folder = _folder(base, given, subset.where) if given else path.parent
        rows, lines = list_rows(path, folder, options, subset.rules, subset.musubi)
    else:
        folder = _folder(base, given, subset.where)
        rows, lines = _beside(subset, folder, options)
    repeats = subset.repeats
    made = [
        replace(
            row,
            name=(name := _name(base, folder / row.name)),
            id=name,
            columns={**row.columns, "file_name": name},
            repeats=repeats,
        )
        for row in rows
    ]
    return made, lines


def _beside(subset: Subset, folder: Path, options: ReadingOptions) -> tuple[list[Row], list[str]]:
    """Images directly in a folder, captions in files beside them, or else the class tokens."""
    if not folder.is_dir():
        raise ValueError(f"{subset.where}: {folder} is not a folder.")
    files = frozenset(path.name for path in folder.iterdir() if path.is_file())
    images = sorted(name for name in files if Path(name).suffix.lower() in TRAINED)
    check_inside(folder, images)
    extension = _extension(subset, folder, files, options)
    asked = replace(options, caption=extension)
    lines = options.caption_lines or ("whole" if subset.musubi else subset.rules.lines)
    class_tokens = subset.settings.get("class_tokens")
    rows, without, cut = list[Row](), list[str](), list[str]()
    for name in images:
        text, where = text_beside(folder, name, files, asked), str(folder / name)
        if text is None:
            without.append(name)
            if subset.musubi:
                continue
        elif lines == "first" and options.caption_lines is None and any(map(str.strip, lines_of(text)[1:])):
            cut.append(name)
        said = subset.text("class_tokens") if text is None else file_text(text, lines)
        captions = with_trigger(subset.rules.captions(said, lines, where), where, options.trigger)
        rows.append(Row(where, name, name, captions, "", {"license": "unknown"}))
    told = untrained(files)
    deeper = [name for name in Place(str(folder)).images if "/" in name]
    if deeper:
        told.append(f"{counted(len(deeper), 'image')} below {folder}, where the trainer does not look: {shown(deeper)}")
    if cut:
        told.append(
            f"{counted(len(cut), 'caption file')} of several lines in {folder}, of which the first is the caption, as "
            f"without enable_wildcard: {shown(cut)}"
        )
    if without:
        what = f"whose caption is the class tokens {class_tokens!r}" if class_tokens is not None else "so with ''"
        what = "so not trained on" if subset.musubi else what
        told.append(
            f"{counted(len(without), 'image')} in {folder} without a {extension} file, {what}: {shown(without)}"
        )
    return rows, told


def _extension(subset: Subset, folder: Path, files: Collection[str], options: ReadingOptions) -> str:
    """The suffix of the caption files: the configuration's, else the option's, else the trainer's own.

    Raises:
        ValueError: None is given, there is no file of the trainer's own, and there are others.
    """
    given = subset.text("caption_extension") or options.caption or ""
    if given:
        return given if given.startswith(".") else f".{given}"
    usual = ".caption"
    ends = {Path(name).suffix for name in files}
    if subset.musubi or (usual not in ends and ".txt" in ends):
        own = "musubi-tuner needs one" if subset.musubi else f"without it the trainer reads {usual}, and there is none"
        raise ValueError(
            f"{subset.where} has no caption_extension ({own} in {folder}). Write it there, or give in the option "
            "'caption' what the trainer was given, such as '.txt'."
        )
    return usual


def _regularization(rows: Sequence[Row], wanted: int) -> list[Row]:
    """Regularization images with the repeats that the trainer gives them, so that they are as many as the others.

    In their order they are taken with their own repeats until there are enough, and then once more each in turn; those
    that come after enough are never seen.

    Args:
        rows: The regularization images with their own repeats.
        wanted: Sum of the other images' repeats.
    """
    repeats: Counter[int] = Counter()
    total, first = 0, True
    while total < wanted and rows:
        for number, row in enumerate(rows):
            step = row.repeats if first else 1
            repeats[number] += step
            total += step
            if total >= wanted:
                break
        first = False
    return [replace(row, repeats=repeats[number]) for number, row in enumerate(rows) if repeats[number]]


def _merged(rows: Sequence[Row]) -> list[Row]:
    """One row for an image that several subsets name, such as one for each resolution: seen as often as in all.

    Raises:
        ValueError: Its captions differ between subsets.
    """
    merged: dict[str, Row] = {}
    for row in rows:
        other = merged.get(row.id)
        if other is not None and (other.captions, other.columns) != (row.captions, row.columns):
            raise ValueError(
                f"{row.where}: the image {row.id!r} comes in two subsets with other captions: {other.captions[0]!r} "
                f"and {row.captions[0]!r}. Give it one caption, or attribute the subsets apart."
            )
        merged[row.id] = row if other is None else replace(other, repeats=other.repeats + row.repeats)
    return list(merged.values())


class TrainingConfigLayout:
    """A `.toml` of kohya's sd-scripts or of musubi-tuner, given itself."""

    name = "toml"
    needs = "the data set configuration of kohya's trainers (.toml), given itself"
    contains: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset({"trigger", "caption_lines"})

    def find(self, place: Place, options: ReadingOptions) -> Found | None:
        """By the file's suffix."""
        if place.path.suffix.lower() != ".toml" or not place.path.is_file():
            return None
        return Found("a data set configuration")

    def read(self, place: Place, options: ReadingOptions) -> FileReader:
        """The images of all subsets.

        Raises:
            ValueError: The configuration or a subset cannot be used.
        """
        if not place.path.is_file():
            raise ValueError(f"{place.given} is no file. Give {self.needs}.")
        base, subsets, read = place.path.parent, list(subsets_of(place.path)), _Read()
        regularization: dict[int, list[Row]] = {}
        wanted: Counter[int] = Counter()
        seen: set[tuple[int, str, str]] = set()
        for subset in subsets:
            if subset.key in seen:  # the trainer takes the first
                read.lines.append(
                    f"{subset.where} has the folder or list of an earlier one there, and is not trained on"
                )
                continue
            seen.add(subset.key)
            rows, lines = _rows_of(subset, base, options)
            read.lines += lines
            if not rows:
                raise ValueError(f"{subset.where} holds no image. Take it out, or correct its folder.")
            if subset.repeats < 1:
                many = counted(len(rows), "image")
                read.lines.append(f"{subset.where}: num_repeats is 0, so nothing is trained on its {many}")
            elif subset.settings.get("is_reg"):
                regularization.setdefault(subset.data_set, []).extend(rows)
            else:
                read.images += rows
                wanted[subset.data_set] += sum(row.repeats for row in rows)
        if not read.images:
            raise ValueError(f"{place.given} names no training image besides regularization images.")
        # The trainer evens each data set out by itself.
        kept = [row for number, rows in regularization.items() for row in _regularization(rows, wanted[number])]
        rows = [*read.images, *kept]
        if regularization:
            rows = [replace(row, columns={**row.columns, REGULARIZATION: "false"}) for row in read.images]
            rows += [replace(row, columns={**row.columns, REGULARIZATION: "true"}) for row in kept]
            count = sum(map(len, regularization.values()))
            more = f", of which {count - len(kept):,} are never seen" if count > len(kept) else ""
            read.lines.append(
                f"{counted(count, 'regularization image')}{more}, repeated as the trainer does until they are as many "
                "as the others of their data set; they are ranked too"
            )
        return FileReader(self.name, finished_rows(_merged(rows)), base, lines=[*read.lines, *said_of(subsets)])
