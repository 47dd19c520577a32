"""How a run reads its images: the options of the run as those of a reader, and what is said of the layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wherefrom.data.framing import AnySize, Framing
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder
from wherefrom.data.image_metadata import CAPTION_COLUMNS
from wherefrom.data.image_set import ImageSet
from wherefrom.data.layouts.base import ReadingOptions
from wherefrom.data.layouts.detection import open_images
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.cli_errors import as_spoken
from wherefrom.runtime.console import Console

if TYPE_CHECKING:
    from wherefrom.commands.prepared_run import AttributionOptions


def image_options(options: AttributionOptions, size: AnySize | None, framing: Framing) -> ImageFolderOptions:
    """How images are read and brought to a size.

    Args:
        options: The run's.
        size: The size.
        framing: How images are brought to it.
    """
    return ImageFolderOptions(
        size,
        options.caption or CAPTION_COLUMNS[0],
        on_error=options.on_error,
        framing=framing,
        layout=options.layout,
        image_column=options.image_column,
    )


def row_options(options: AttributionOptions) -> ReadingOptions:
    """How the rows of images are read, without decoding any."""
    return replace(image_options(options, None, Framing()).reading, cache=options.store)


def read_images(store: Store, place: str | Path, options: ImageFolderOptions, console: Console) -> ImageSet:
    """The images of a place; says what layout they are of, where that is not as it always was.

    Args:
        store: Where the images are kept.
        place: What the user named.
        options: How to read it.
        console: Shows what is being read.

    Raises:
        ValueError: The place is of no layout, or something there cannot be used.
        StorageError: The store could not be written.
    """
    opened = open_images(place, replace(options.reading, cache=store.root))
    for line in opened.lines[1:] if opened.usual else opened.lines:
        console.log(as_spoken(line))
    return build_image_folder(store, opened, options, console.progress)
