"""User folders of captioned images in Hugging Face's `imagefolder` layout, resized to one size."""

from __future__ import annotations

import hashlib
import logging
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wherefrom.data.image_metadata import Row, metadata_files, read_rows, shown
from wherefrom.data.image_set import PIXELS, ImageSet, read_image_set, write_pixels_header, write_table
from wherefrom.data.repeats import REPEATS, parse_repeats
from wherefrom.runtime.artifacts import Store, canonical_json, hash_file, identity_hash, read_manifest, replacing
from wherefrom.runtime.keyed_random import hash_text
from wherefrom.runtime.stable_names import settings_identity

# Pillow would also open formats that run external programs (EPS), and some that are not images.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
# Pillow raises many unrelated types on damaged files.
UNREADABLE = (
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFolderOptions:
    """Options of reading an image folder.

    Attributes:
        size: Side in pixels to which every image is cropped (largest centred square) and resized; None keeps images
            unchanged and requires all to have the same size.
        caption: Name of the caption column; a cell holds one caption or, in `.jsonl` and `.parquet`, a list of them.
        columns: Further columns to keep (`license` always is); None keeps all.
        skip_unreadable: Skip images that cannot be read instead of raising; they are logged, and listed in the
            manifest.
    """

    size: int | None = None
    caption: str = "text"
    columns: tuple[str, ...] | None = None
    skip_unreadable: bool = False


def load_image(path: Path | BinaryIO, size: int | None) -> UInt8[NDArray[np.uint8], "h w 3"]:
    """Loads an image as RGB: upright, on white and, given a size, cropped to its largest centred square and resized.

    Raises:
        ValueError: The pixel mode has no defined white level.
    """
    Image.init()
    with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):  # Pillow's own conversion to 8 bits clips instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels of Pillow's mode {image.mode!r} have no defined white level; save it with 8 or 16 bits per channel"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _write_pixels(
    folder: Path,
    path: Path,
    rows: Sequence[Row],
    options: ImageFolderOptions,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Row], list[str], str]:
    """Streams the pixels to disk; returns the rows that were read, the names of skipped images, and the pixel hash."""
    read: list[Row] = []
    skipped: list[str] = []
    shape: tuple[int, ...] = ()
    digest = hashlib.blake2b(digest_size=16)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        for index, row in enumerate(rows):
            if progress is not None:
                progress(index, len(rows))
            try:
                pixels = load_image(folder / row.name, options.size)
            except UNREADABLE as error:
                if not options.skip_unreadable:
                    raise ValueError(
                        f"{folder / row.name} ({row.where}) cannot be read: {error}. Repair it, remove it with its "
                        "row, or set skip_unreadable."
                    ) from error
                skipped.append(row.name)
                continue
            if not read:
                shape = pixels.shape
                write_pixels_header(stream, (len(rows), *shape))
                start = stream.tell()
            if pixels.shape != shape:
                raise ValueError(
                    f"{folder / row.name} has the wrong size: {pixels.shape[1]}x{pixels.shape[0]} pixels, while "
                    f"{read[0].name!r} has {shape[1]}x{shape[0]}. Set the option 'size' to resize all to one size."
                )
            read.append(row)
            stream.write(pixels.data)
            digest.update(pixels.data)
        if not read:
            raise ValueError(f"None of the {len(rows)} images in {folder} can be read. Is it the right folder?")
        stream.seek(0)
        write_pixels_header(stream, (len(read), *shape))
        assert stream.tell() == start, "the header must not grow into the pixels"
    if progress is not None:
        progress(len(rows), len(rows))
    return read, skipped, digest.hexdigest()


def _contents(folder: Path, rows: Sequence[Row]) -> str:
    """Hashes the names and bytes of all images."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        try:
            content = hash_file(folder / row.name)
        except OSError:
            content = "unreadable"  # loading it raises the reason
        digest.update(f"{row.name}\0{content}\0".encode())
    return digest.hexdigest()


def build_image_folder(
    store: Store,
    folder: Path,
    options: ImageFolderOptions = ImageFolderOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Builds the image set of a folder in the order of its ids, or loads it from the store.

    The id is the column `id`, or else the path below the folder. Columns: `file_name`, `license` (`unknown` where none
    is given), `split` if there are splits, and those of the metadata. Every file is hashed at each call, so the stored
    images are never stale.

    Args:
        store: Where the images are kept.
        folder: The user's folder.
        options: Options of reading the folder.
        progress: Called with (done, total) while images are read.

    Raises:
        ValueError: The metadata or an image cannot be used; the message names the file and the remedy.
        StorageError: The store could not be written.
    """
    if options.size is not None and options.size < 1:
        raise ValueError(f"size {options.size} is not a number of pixels. Give at least 1, or None.")
    rows = read_rows(folder, options.caption, options.columns)
    parse_repeats((row.id for row in rows), (row.columns.get(REPEATS, "") for row in rows))  # before all is decoded
    identity: dict[str, Any] = {
        **settings_identity(options),
        "metadata": {path.relative_to(folder).as_posix(): hash_file(path) for path in metadata_files(folder)},
        "contents": _contents(folder, rows),
        "pillow": PIL.__version__,
    }

    def build(partial: Path) -> Mapping[str, Any]:
        read, skipped, pixels = _write_pixels(folder, partial / PIXELS, rows, options, progress)
        ids, captions = [row.id for row in read], [row.captions for row in read]
        columns = {
            name: [row.columns.get(name, "") for row in read] for name in sorted({n for r in read for n in r.columns})
        }
        if read[0].split:
            columns["split"] = [row.split for row in read]
        write_table(partial, ids, captions, columns)
        fingerprint = identity_hash({"ids": ids, "captions": canonical_json(captions), "pixels": pixels})
        return {"fingerprint": fingerprint, "skipped": skipped}

    artifact = store.make("image_folder", identity, build)
    skipped = read_manifest(artifact)["skipped"]
    if skipped:
        _logger.warning(
            "%s: skipped %d of %d images that cannot be read: %s", folder, len(skipped), len(rows), shown(skipped)
        )
    return read_image_set(artifact)


def split_images(images: ImageSet, validation_share: float) -> tuple[ImageSet, ImageSet]:
    """Splits images into (training, validation): by the column `split`, else a share by the hash of the id.

    The assignment of an image does not depend on the others.

    Raises:
        ValueError: One of the two would be empty.
    """
    train, validation = images, images.subset([])
    if "split" in images.columns:
        train, validation = images.where("split", "train"), images.where("split", "validation")
    if not len(validation):
        held = [hash_text(f"validation/{name}") % 10_000 < validation_share * 10_000 for name in train.ids]
        validation = train.subset([index for index, out in enumerate(held) if out])
        train = train.subset([index for index, out in enumerate(held) if not out])
    if not len(train) or not len(validation):
        raise ValueError(
            f"Of {len(images)} images, {len(train)} are for training and {len(validation)} for validation, but "
            f"both need some. Change validation_share ({validation_share}), or the column 'split'."
        )
    return train, validation
