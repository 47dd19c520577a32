"""A caption file beside each image, as ai-toolkit, OneTrainer, SimpleTuner and kohya read them."""

from __future__ import annotations

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
    with_folder_splits,
)
from wherefrom.data.layouts.caption_files import (
    SUFFIXES_OF_CAPTIONS,
    caption_file,
    captions_of_text,
    text_beside,
    with_trigger,
)
from wherefrom.data.layouts.left_out import images_to_read, left_out


class SidecarLayout:
    """`a.jpg` beside `a.txt` or `a.caption`, in the folder or below it.

    The lines of a file are alternatives, as OneTrainer draws them; ai-toolkit reads the whole file as one caption,
    kohya its first line: the option `caption_lines` says so. Where every file has one line, they all agree.
    """

    name = "sidecar"
    needs = f"a caption file ({' or '.join(SUFFIXES_OF_CAPTIONS)}) of the same name beside each image"
    contains: frozenset[str] = frozenset({"images"})
    takes: frozenset[str] = frozenset({"one_caption", "trigger", "caption_lines"})

    def find(self, place: Place, options: ReadingOptions) -> Found | None:
        """Counts the images that have a caption file."""
        if not place.path.is_dir():
            return None
        files, images = frozenset(place.files), images_to_read(place)
        asked = options if options.caption is None or options.caption.startswith(".") else ReadingOptions()
        names = [name for image in images for name in caption_file(image, files, asked)]
        if not names:
            return None
        suffixes = " and ".join(sorted({PurePosixPath(name).suffix for name in names}))
        have = len({PurePosixPath(name).with_suffix("") for name in names})
        return Found(f"{suffixes} beside {have:,} of {counted(len(images), 'image')}", have >= len(images))

    def read(self, place: Place, options: ReadingOptions) -> FileReader:
        """The images, those without a caption file with the empty caption (or the one caption that is given)."""
        files, images, folder = frozenset(place.files), images_to_read(place), place.path
        check_inside(folder, images)
        rows: list[Row] = []
        without: list[str] = []
        several = 0
        for image in images:
            text = text_beside(folder, image, files, options)
            if text is None:
                without.append(image)
                captions: tuple[str, ...] = (options.one_caption or "",)
            else:
                captions = captions_of_text(text, options.caption_lines or "each")
            several += len(captions) > 1
            captions = with_trigger(captions, str(folder / image), options.trigger, before=True)
            rows.append(image_row(image, captions))
        if not rows:
            raise ValueError(f"{place.given} holds no image. It should hold {self.needs}.")
        lines = left_out(place)
        if several:
            lines.append(
                f"{counted(several, 'caption file')} of several lines: each line is a caption of its own; "
                "caption_lines: first or whole reads them otherwise"
            )
        if without:
            lines.append(
                f"{counted(len(without), 'image')} of {len(rows):,} without a caption file, whose caption is taken as "
                f"{options.one_caption or ''!r}: {shown(without)}"
            )
        stems = {PurePosixPath(image).with_suffix("") for image in images}
        alone = [
            name
            for name in place.files
            if PurePosixPath(name).suffix in SUFFIXES_OF_CAPTIONS and PurePosixPath(name).with_suffix("") not in stems
        ]
        if alone:
            lines.append(f"{counted(len(alone), 'caption file')} without an image beside it: {shown(alone)}")
        made, _ = with_folder_splits(folder, rows)
        return FileReader(self.name, finished_rows(made), folder, lines=lines)
