"""Which layout a place is of: found out and said, or named by the user."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wherefrom.data.layouts.base import Found, ImageReader, Layout, Place, ReadingOptions, Row, shown
from wherefrom.data.layouts.hub import HubLayout
from wherefrom.data.layouts.image_lists import ImageListLayout
from wherefrom.data.layouts.imagefolder import ImageFolderLayout
from wherefrom.data.layouts.images_only import ImagesOnlyLayout
from wherefrom.data.layouts.kohya_folders import KohyaFoldersLayout
from wherefrom.data.layouts.parquet import ParquetLayout
from wherefrom.data.layouts.saved_dataset import SavedDatasetLayout
from wherefrom.data.layouts.sidecars import SidecarLayout
from wherefrom.data.layouts.training_configs import TrainingConfigLayout

# In this order: where a place is of several, the first is taken, unless the captions would be others.
LAYOUTS: tuple[Layout, ...] = (
    ImageFolderLayout(),
    SavedDatasetLayout(),
    TrainingConfigLayout(),
    ImageListLayout(),
    KohyaFoldersLayout(),
    SidecarLayout(),
    ParquetLayout(),
    ImagesOnlyLayout(),
    HubLayout(),
)


@dataclass(frozen=True)
class OpenedImages:
    """A place whose rows are read.

    Attributes:
        given: The place as it was given.
        reader: The rows and their images.
        lines: What the user is told: the layout and why, then what the reader says.
        usual: Whether the first line says what was always so: a metadata file beside images.
    """

    given: str
    reader: ImageReader
    lines: Sequence[str]
    usual: bool = False

    @property
    def place(self) -> str:
        """The place as seen from everywhere."""
        return str(Path(self.given).resolve()) if Path(self.given).exists() else self.given


def open_images(place: str | Path, options: ReadingOptions = ReadingOptions()) -> OpenedImages:
    """Reads the rows of a place, in the layout that it is of.

    Args:
        place: A folder, a file, or a name that a layout knows.
        options: What to read; its `layout` overrides what would be found out.

    Raises:
        ValueError: The place is of no layout, or of several whose captions differ; or something there cannot be used.
    """
    where = Place(str(place))
    if options.layout is not None:
        layout = layout_named(options.layout)
        reader = layout.read(where, options)
        line = f"reads {place} as {layout.name}, as asked for"
        return OpenedImages(where.given, reader, [line, *_choices(layout, options), *reader.lines])
    found = [(layout, why) for layout in LAYOUTS if (why := layout.find(where, options)) is not None]
    if not found:
        raise ValueError(_unknown(where))
    (layout, why), others = found[0], found[1:]
    reader = layout.read(where, options)
    more = _others(where, (layout, reader), others, options)
    line = f"reads {place} as {layout.name} ({why.why}); the option 'layout' overrides"
    return OpenedImages(
        where.given,
        reader,
        [line, *more, *_unread_configurations(where), *_choices(layout, options), *reader.lines],
        isinstance(layout, ImageFolderLayout) and not more,
    )


def _unread_configurations(place: Place) -> list[str]:
    """What is said of configurations of trainers in a folder: the repeats and captions that they set are not taken."""
    if not place.path.is_dir():
        return []
    there = [path.name for path in sorted(place.path.glob("*.toml")) if path.is_file() and _configures(path)]
    return [f"does not read {shown(there)}, which sets captions and repeats where it is given itself"] if there else []


def _configures(path: Path) -> bool:
    with path.open("rb") as stream:
        return b"[datasets" in stream.read(65_536)


def _choices(layout: Layout, options: ReadingOptions) -> list[str]:
    """What is said of options that a layout does not take, or takes in a way that is not plain from their names."""
    given = {
        "one_caption": options.one_caption is not None,
        "trigger": options.trigger is not None,
        "caption_lines": options.caption_lines is not None,
    }
    idle = [f"the option {name!r}" for name, asked in given.items() if asked and name not in layout.takes]
    verb = "changes" if len(idle) == 1 else "change"
    return [f"{' and '.join(idle)} {verb} nothing: {layout.name} has no such captions"] if idle else []


def layout_named(name: str) -> Layout:
    """The layout of this name.

    Raises:
        ValueError: There is none.
    """
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    names = [layout.name for layout in LAYOUTS]
    close = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}."
    raise ValueError(f"layout: there is none called {name!r}; {hint}")


def _unknown(place: Place) -> str:
    """That a place is of no layout, and what each needs."""
    if not place.path.exists():
        return f"images: there is no folder or file {place.given!r}."
    what = f"{place.given} is of no layout that can be read"
    listed = "".join(f"\n  {layout.name}: {layout.needs}" for layout in LAYOUTS)
    return f"{what}. The layouts, and what each needs:{listed}"


def _others(
    place: Place, taken: tuple[Layout, ImageReader], others: Sequence[tuple[Layout, Found]], options: ReadingOptions
) -> list[str]:
    """What is said of other layouts that a place is of too.

    Raises:
        ValueError: One of them has other captions.
    """
    layout, reader = taken
    lines = []
    rows = {row.name: row for row in reader.rows}
    for other, why in others:
        if other.name in layout.contains:
            continue
        lines.append(f"does not read what is there of the layout {other.name} ({why.why}): {layout.name} comes first")
        if not why.whole:
            continue
        try:
            there = other.read(place, options).rows
        except ValueError:  # it is not of that layout, then
            continue
        unlike = [(rows[row.name], row) for row in there if row.name in rows and _differ(rows[row.name], row)]
        if unlike:
            (one, two), count = unlike[0], len(unlike)
            raise ValueError(
                f"{place.given} can be read as {layout.name} and as {other.name} ({why.why}), and they differ for "
                f"{count} of {len(rows)} images: {one.name!r} is {_said(one)} in the first and {_said(two)} in the "
                "second. Say which one the model was trained with in the option 'layout'."
            )
    return lines


def _differ(one: Row, two: Row) -> bool:
    return {each.strip() for each in one.captions} != {each.strip() for each in two.captions} or (
        one.repeats != two.repeats
    )


def _said(row: Row) -> str:
    text = repr(row.captions[0])
    caption = text if len(text) <= 60 else f"{text[:57]}…"
    return caption if row.repeats == 1 else f"{caption} ({row.repeats} times)"
