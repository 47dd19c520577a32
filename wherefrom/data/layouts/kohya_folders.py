"""kohya's DreamBooth folders: `10_name/` holds images that an epoch of training sees ten times."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from wherefrom.data.layouts.base import (
    FileReader,
    Found,
    Place,
    ReadingOptions,
    Row,
    check_inside,
    counted,
    finished_rows,
    image_row,
    shown,
)
from wherefrom.data.layouts.caption_files import captions_of_text, lines_of, text_beside, with_trigger
from wherefrom.data.layouts.left_out import TRAINED, images_to_read, left_out, untrained

_NAME = re.compile(r"(\d{1,6})_(.*)")


def repeats_of(folder: str) -> tuple[int, str] | None:
    """Repeats and class of a folder's name; None where it has none."""
    named = _NAME.fullmatch(folder)
    return None if named is None else (int(named.group(1)), named.group(2).strip())


class KohyaFoldersLayout:
    """Folders `REPEATS_CLASS`; the caption is the first line of a file beside the image, or else the class."""

    name = "kohya"
    needs = "folders such as 10_name, whose number is how often an epoch of training sees their images"
    contains: frozenset[str] = frozenset({"sidecar", "images"})  # lines and classes are as its trainer reads them
    takes: frozenset[str] = frozenset({"trigger", "caption_lines"})

    def _seen(self, place: Place) -> tuple[dict[str, tuple[int, str]], list[str]]:
        """Images with their repeats and classes; and those that the trainer does not look at."""
        seen: dict[str, tuple[int, str]] = {}
        unseen: list[str] = []
        images = [name for name in images_to_read(place) if PurePosixPath(name).suffix.lower() in TRAINED]
        own = repeats_of(place.path.resolve().name)
        alone = own is not None and all("/" not in name for name in images)  # one such folder is given itself
        for image in images:
            parts = PurePosixPath(image).parts
            named = own if alone else repeats_of(parts[0]) if len(parts) == 2 else None
            if named is None or named[0] < 1:
                unseen.append(image)
            else:
                seen[image] = named
        return seen, unseen

    def find(self, place: Place, options: ReadingOptions) -> Found | None:
        """Looks for images in a folder of such a name."""
        seen = self._seen(place)[0] if place.path.is_dir() else {}
        folders = sorted({PurePosixPath(image).parts[0] if "/" in image else place.path.name for image in seen})
        return Found(f"{shown(folders)}") if folders else None

    def read(self, place: Place, options: ReadingOptions) -> FileReader:
        """The images.

        Raises:
            ValueError: There is none in such a folder, some lie where the trainer does not look, or a caption cannot
                be used.
        """
        seen, unseen = self._seen(place) if place.path.is_dir() else ({}, [])
        if not seen:
            raise ValueError(f"{place.given} holds no image in a folder such as 10_name. It should hold {self.needs}.")
        if unseen:
            raise ValueError(
                f"{place.given}: {counted(len(unseen), 'image')} not directly in a folder such as 10_name, of 1 or "
                f"more, so that kohya's trainer does not see them: {shown(unseen)}. Move them away, or say layout: "
                "sidecar, where all count alike."
            )
        folder, files = place.path, frozenset(place.files)
        check_inside(folder, list(seen))
        rows: list[Row] = []
        classes, cut = 0, list[str]()
        for image, (repeats, words) in seen.items():
            text = text_beside(folder, image, files, options)
            classes += text is None
            captions = (words,) if text is None else captions_of_text(text, options.caption_lines or "first")
            if text is not None and options.caption_lines is None and any(map(str.strip, lines_of(text)[1:])):
                cut.append(image)
            captions = with_trigger(captions, str(folder / image), options.trigger)
            rows.append(image_row(image, captions, repeats=repeats))
        lines = [*left_out(place), *untrained(place.files)]
        times = sorted({repeats for repeats, _ in seen.values()})
        lines.append(f"training sees images {', '.join(map(str, times))} times an epoch, which weighs them so")
        if classes:
            lines.append(f"{counted(classes, 'image')} without a caption file, whose caption is the class in the name")
        if cut:
            lines.append(
                f"{counted(len(cut), 'caption file')} of several lines, of which the first is the caption, as kohya's "
                f"trainer takes it without enable_wildcard: {shown(cut)}; caption_lines: each or whole reads them "
                "otherwise"
            )
        return FileReader(self.name, finished_rows(rows), folder, lines=lines)
