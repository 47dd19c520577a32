"""User folders of captioned images, in any layout that a reader knows, resized to one size."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL

from wherefrom.data.folder_decoding import FolderDecoding, decode_rows
from wherefrom.data.framing import AnySize, Framing, one_number, sides_of
from wherefrom.data.image_files import UNREADABLE as UNREADABLE
from wherefrom.data.image_files import load_image as load_image
from wherefrom.data.image_set import ImageSet, read_image_set, write_table
from wherefrom.data.layouts.base import CaptionLines, ImageReader, ReadingOptions, Row, shown
from wherefrom.data.layouts.detection import LAYOUTS, OpenedImages, open_images
from wherefrom.data.on_error import OnError, checked, reading_identity, takes_skip_unreadable
from wherefrom.data.repeats import REPEATS, parse_repeats
from wherefrom.runtime.artifacts import Store, canonical_json, identity_hash, read_manifest
from wherefrom.runtime.keyed_random import hash_text
from wherefrom.runtime.stable_names import added_setting, settings_identity

WORK = "image_folder_decoding"  # kind of what an interrupted reading leaves
_logger = logging.getLogger(__name__)


@takes_skip_unreadable
@dataclass(frozen=True)
class ImageFolderOptions:
    """Options of reading an image folder.

    Attributes:
        size: Side in pixels to which every image is cropped (largest centred square) and resized, or (height, width);
            None keeps images unchanged and requires all to have the same size.
        caption: Name of the caption column, whose cells hold one caption or, in `.jsonl` and `.parquet`, a list of
            them; or suffix of the caption files, such as `.txt`. None finds it out.
        columns: Further columns to keep (`license` always is); None keeps all.
        on_error: `skip` leaves out images that cannot be read instead of raising; they are logged, and listed in the
            manifest.
        framing: Padding, aspect buckets, EXIF and transparency, where they are not as usual.
        layout: See `ReadingOptions`, as the options below.
        one_caption: The caption of all images of a folder that holds no captions.
        trigger: What stands for `[trigger]` in captions.
        caption_lines: What the lines of a caption file are: `each`, `first` or `whole`.
        image_column: Name of the column of images, in a table that has several.

    Raises:
        ValueError: An unknown choice.
    """

    size: AnySize | None = None
    caption: str | None = None
    columns: tuple[str, ...] | None = None
    on_error: OnError = "stop"
    framing: Framing = added_setting(Framing())
    layout: str | None = added_setting(None)
    one_caption: str | None = added_setting(None)
    trigger: str | None = added_setting(None)
    caption_lines: CaptionLines | None = added_setting(None)
    image_column: str | None = added_setting(None)

    def __post_init__(self) -> None:
        checked(self.on_error)
        object.__setattr__(self, "size", one_number(self.size))
        _ = self.reading

    @classmethod
    def of_reading(
        cls,
        reading: ReadingOptions,
        *,
        size: AnySize | None = None,
        on_error: OnError = "stop",
        framing: Framing = Framing(),
    ) -> ImageFolderOptions:
        """The options that read rows so, and images as the others say."""
        rows = {name: value for name, value in vars(reading).items() if name != "cache"}
        return cls(size=size, on_error=on_error, framing=framing, **rows)

    @property
    def reading(self) -> ReadingOptions:
        """What a reader is asked for."""
        return ReadingOptions(
            self.layout,
            self.caption,
            self.columns,
            self.one_caption,
            self.trigger,
            self.caption_lines,
            self.image_column,
        )

    def found(self, reader: ImageReader) -> ImageFolderOptions:
        """These options with what was found out, for the identity; the first layout's name enters none."""
        return replace(self, layout=None if reader.layout == LAYOUTS[0].name else reader.layout, caption=reader.caption)


def _together(rows: Sequence[Row], contents: Sequence[str]) -> str:
    """Hashes the names and contents of all images."""
    digest = hashlib.blake2b(digest_size=16)
    for row, content in zip(rows, contents, strict=True):
        digest.update(f"{row.name}\0{content}\0".encode())
    return digest.hexdigest()


def build_image_folder(
    store: Store,
    folder: str | Path | OpenedImages,
    options: ImageFolderOptions = ImageFolderOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Builds the image set of a folder in the order of its ids, or loads it from the store.

    The id is the column `id`, or else the path below the folder. Columns: `file_name`, `license` (`unknown` where none
    is given), `split` if there are splits, `repeats` if training sees some images more often than others, and those of
    the metadata. Every file is hashed at each call, so the stored images are never stale.

    Args:
        store: Where the images are kept.
        folder: The user's folder, or file or name, in any layout; or what `open_images` made of it, with the same
            options.
        options: Options of reading the folder.
        progress: Called with (done, total) while images are read.

    Raises:
        ValueError: The place is of no layout, or the metadata or an image cannot be used; the message names the file
            and the remedy.
        StorageError: The store could not be written.
    """
    if options.size is not None:
        sides_of(options.size)
    options = replace(options, framing=options.framing.resolved(options.size))
    reading = replace(options.reading, cache=store.root)
    opened = folder if isinstance(folder, OpenedImages) else open_images(folder, reading)
    if not isinstance(folder, OpenedImages):
        for line in opened.lines[1:] if opened.usual else opened.lines:
            _logger.warning("%s: %s", folder, line)
    reader, rows = opened.reader, opened.reader.rows
    parse_repeats((row.id for row in rows), (row.columns.get(REPEATS, "") for row in rows))  # before all is decoded
    contents = [reader.content_key(row) for row in rows]
    identity: dict[str, Any] = {
        **reading_identity(options.found(reader)),
        "metadata": dict(reader.metadata_hashes()),
        "contents": _together(rows, contents),
        "pillow": PIL.__version__,
    }

    def build(partial: Path) -> Mapping[str, Any]:
        how = FolderDecoding(reader.open_image, options.size, options.framing, options.on_error == "skip")
        work = {
            "size": options.size,
            **settings_identity(options.framing),
            "folder": opened.place,
            "pillow": PIL.__version__,
        }
        with store.lock(WORK, work):
            made = decode_rows(
                store.partial(WORK, work),
                target=partial,
                rows=rows,
                contents=contents,
                how=how,
                progress=progress,
            )
        ids, captions = [row.id for row in made.rows], [row.captions for row in made.rows]
        names = sorted({name for row in made.rows for name in row.columns})
        columns = {name: [row.columns.get(name, "") for row in made.rows] for name in names}
        if made.rows[0].split:
            columns["split"] = [row.split for row in made.rows]
        if any(row.repeats != 1 for row in made.rows):
            columns["repeats"] = [str(row.repeats) for row in made.rows]
        write_table(partial, ids, captions, columns)
        content: dict[str, Any] = {"ids": ids, "captions": canonical_json(captions), "pixels": made.pixels}
        if len(set(made.sizes)) > 1:
            content["sizes"] = [list(size) for size in made.sizes]
        reasons = {"reasons": dict(made.skipped)} if made.skipped else {}
        return {"fingerprint": identity_hash(content), "skipped": list(made.skipped), **reasons}

    artifact = store.make("image_folder", identity, build)
    skipped = read_manifest(artifact)["skipped"]
    if skipped:
        _logger.warning(
            "%s: skipped %d of %d images that cannot be read: %s", opened.given, len(skipped), len(rows), shown(skipped)
        )
    return read_image_set(artifact)


def split_images(images: ImageSet, validation_share: float | None) -> tuple[ImageSet, ImageSet]:
    """Splits images into (training, validation): by the column `split`, else a share by the hash of the id.

    Args:
        images: The images.
        validation_share: See `hold_out`; for images that name no validation split.

    Raises:
        ValueError: No image is for training, or a share is held out that is none or all of them.
    """
    if "split" not in images.columns:
        return hold_out(images, validation_share)
    train, validation = images.where("split", "train"), images.where("split", "validation")
    if not len(validation) and len(train):
        return hold_out(train, validation_share)
    if not len(train):
        raise _one_is_empty(len(images), 0, len(validation), validation_share)
    return train, validation


def hold_out(images: ImageSet, validation_share: float | None) -> tuple[ImageSet, ImageSet]:
    """Splits images into (training, validation) by the hashes of their ids.

    The assignment of an image does not depend on the others.

    Args:
        images: The images.
        validation_share: Share that is held out; None or 0 holds none out.

    Raises:
        ValueError: There is no image, or a share is held out that is none or all of them.
    """
    share = validation_share or 0.0
    held = [hash_text(f"validation/{name}") % 10_000 < share * 10_000 for name in images.ids] if share else []
    out, kept = sum(held), len(images) - sum(held)
    if not kept or (share and not out):
        raise _one_is_empty(len(images), kept, out, validation_share)
    if not out:
        return images, images.subset([])
    train, validation = ([index for index, each in enumerate(held) if each is side] for side in (False, True))
    return images.subset(train), images.subset(validation)


def _one_is_empty(images: int, training: int, validation: int, share: float | None) -> ValueError:
    return ValueError(
        f"Of {images} images, {training} are for training and {validation} for validation, but both need some. Change "
        f"validation_share ({share}), or the column 'split'."
    )
