"""Lists of images: kohya's fine-tuning metadata in one JSON object, and JSON lines as of musubi-tuner."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wherefrom.data.layouts.base import (
    SUFFIXES,
    FileReader,
    Found,
    Place,
    ReadingOptions,
    Row,
    counted,
    finished_rows,
    image_row,
    inside,
    shown,
)
from wherefrom.data.layouts.caption_files import lines_of, with_trigger
from wherefrom.data.layouts.kohya_captions import CaptionRules

_LARGEST = 2**29
_IMAGE = "image_path"
_SUFFIXES = (".json", ".jsonl")
# Kept beside the captions by trainers; says nothing of them.
_SILENT = frozenset(("caption", "tags", "train_resolution", "image_size", "latents", _IMAGE))


def _entries(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """(where, name, entry) of each image."""
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, which is no list of captions.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    entry = json.loads(line)
                    yield f"{path}, line {number}", entry.get(_IMAGE) if isinstance(entry, dict) else None, entry
            return
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON in UTF-8 ({error}). Write it again.") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} is no list of images: it should map each image's path to its caption and tags.")
    yield from ((f"{path}, {name!r}", name, entry) for name, entry in content.items())


def _text_of(entry: Mapping[str, Any], where: str, rules: CaptionRules) -> str:
    """The text of an entry: caption and tags with the separator between, as kohya's trainer joins them.

    Raises:
        ValueError: It has neither, or one that is no text.
    """
    caption, tags = entry.get("caption"), entry.get("tags")
    if isinstance(tags, list):
        tags = f"{rules.separator} ".join(map(str, tags))
    if (caption is None and tags is None) or not all(word is None or isinstance(word, str) for word in (caption, tags)):
        raise ValueError(f"{where} has no caption and no tags that are text. Write one; it may be empty.")
    return "\n".join(lines_of(rules.entry(caption or "", tags)))


def list_rows(
    path: Path, folder: Path, options: ReadingOptions, rules: CaptionRules = CaptionRules(), musubi: bool | None = None
) -> tuple[list[Row], list[str]]:
    """The rows of a list, and what is said of it.

    Args:
        path: The list.
        folder: Where its images are; no entry leads out of it.
        options: The trigger, and what lines are where they say.
        rules: How captions are made of caption and tags.
        musubi: Whether the list is musubi-tuner's, which trains on whole captions, and not on their first lines; None
            takes JSON lines for such.

    Raises:
        ValueError: The list or an entry is of another form, or an image is missing or leads out of the folder.
    """
    rows: list[Row] = []
    more: set[str] = set()
    several: list[str] = []
    musubi = path.suffix.lower() == ".jsonl" if musubi is None else musubi
    lines = options.caption_lines or ("whole" if musubi else rules.lines)
    for where, name, entry in _entries(path):
        if not isinstance(name, str) or not name or not isinstance(entry, Mapping):
            raise ValueError(f"{where} is of another form: an image has a path, and an object with its caption.")
        more |= {str(key) for key in entry} - _SILENT
        image = _image(folder, name, where)
        text = _text_of(entry, where, rules)
        if "\n" in text.strip():
            several.append(image)
        captions = with_trigger(rules.captions(text, lines, where), where, options.trigger)
        rows.append(image_row(image, captions, where=where))
    told = [f"of {path.name} caption and tags are read, not {shown(sorted(more))}"] if more else []
    if several and options.caption_lines is None:
        how = {"each": "each of them is a caption", "first": "the first is the caption", "whole": "all are one caption"}
        told.append(
            f"{counted(len(several), 'caption')} of several lines in {path.name}, and {how[lines]}: {shown(several)}; "
            "caption_lines: each, first or whole reads them otherwise"
        )
    return rows, told


def _image(folder: Path, name: str, where: str) -> str:
    """The path below the folder of an image that a list names, with or without its suffix."""
    path = Path(name.replace("\\", "/"))
    path = path if path.is_absolute() else folder / path
    if "\0" in name or ".." in path.parts or not inside(folder, path):
        raise ValueError(
            f"{where}: {name!r} leads out of {folder}, or could. Put the list beside its images, and name them "
            "relative to it, without '..'."
        )
    found = [path] if path.is_file() else [each for end in sorted(SUFFIXES) if (each := Path(f"{path}{end}")).is_file()]
    if len(found) != 1:
        several = f"may be any of {shown([each.name for each in found])}; write which" if found else "is not there"
        raise ValueError(f"{where}: the image {name!r} {several}. Images are looked for below {folder}.")
    if not inside(folder, found[0]):
        raise ValueError(f"{where}: {found[0]} is a link that leads out of {folder}. Put the image itself there.")
    if found[0].is_relative_to(folder):
        return found[0].relative_to(folder).as_posix()
    return Path(os.path.realpath(found[0])).relative_to(os.path.realpath(folder)).as_posix()


class ImageListLayout:
    """A `.json` or `.jsonl` that names images with their captions: given itself, or found beside its images."""

    name = "list"
    needs = (
        'a list of images: JSON {"path": {"caption": …, "tags": …}} (kohya), or JSON lines of image_path and caption'
    )
    contains: frozenset[str] = frozenset({"images"})
    takes: frozenset[str] = frozenset({"trigger", "caption_lines"})

    def _lists(self, place: Place) -> list[Path]:
        if place.path.is_file():
            return [place.path] if place.path.suffix.lower() in _SUFFIXES else []
        if not place.path.is_dir():
            return []
        there = [path for path in sorted(place.path.iterdir()) if path.suffix.lower() in _SUFFIXES and path.is_file()]
        return [path for path in there if not path.name.startswith("metadata.") and _looks_like_a_list(path)]

    def find(self, place: Place, options: ReadingOptions) -> Found | None:
        """The lists, by their beginnings."""
        lists = self._lists(place)
        return Found(shown([path.name for path in lists])) if lists else None

    def read(self, place: Place, options: ReadingOptions) -> FileReader:
        """The rows of the one list.

        Raises:
            ValueError: There is none or more than one, it cannot be used, or images beside it are not in it.
        """
        lists = self._lists(place)
        if len(lists) != 1:
            names = f": {shown([path.name for path in lists])}" if lists else ""
            raise ValueError(f"{place.given} holds {counted(len(lists), 'list')} of images{names}. Give one itself.")
        path, folder = lists[0], lists[0].parent
        rows, lines = list_rows(path, folder, options)
        if place.path.is_dir():
            unnamed = sorted(set(place.images) - {row.name for row in rows})
            if unnamed:
                lines.append(
                    f"{counted(len(unnamed), 'image')} in the folder and not in {path.name}, so not among the training "
                    f"images: {shown(unnamed)}"
                )
        return FileReader(self.name, finished_rows(rows), folder, lines=lines)


def _looks_like_a_list(path: Path) -> bool:
    """By its beginning alone."""
    with path.open("rb") as stream:
        head = stream.read(8192).decode("utf-8", "replace").lstrip("\ufeff \r\n\t")
    if path.suffix.lower() == ".jsonl":
        return head.startswith("{") and f'"{_IMAGE}"' in head
    return head.startswith("{") and ('"caption"' in head or '"tags"' in head)
