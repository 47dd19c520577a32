"""Decoding of a folder's rows of images into an image set's pixels: headers first, and nothing twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wherefrom.data.decoded_pixels import DecodedPixels, Place, stream_of
from wherefrom.data.framing import AnySize, Framing
from wherefrom.data.image_files import UNREADABLE, load_image, read_header, reason_of
from wherefrom.data.layouts.base import Row
from wherefrom.models.image_sizes import Size
from wherefrom.runtime.artifacts import StorageError, write_json

_SHOWN = 5
_RECORD = "decoded.json"
OpenImage = Callable[[Row], Path | BinaryIO]


@dataclass(frozen=True)
class FolderDecoding:
    """How a folder's images are decoded.

    Attributes:
        open_image: The file of a row's image, or its open stream.
        size: See `load_image`; None keeps the images' own and requires all to have the same.
        framing: See `load_image`.
        skip: Leave out images that cannot be read instead of raising.
    """

    open_image: OpenImage
    size: AnySize | None = None
    framing: Framing = Framing()
    skip: bool = False


@dataclass(frozen=True)
class DecodedRows:
    """What was decoded.

    Attributes:
        rows: The rows whose images could be read.
        sizes: (height, width) of each of these images.
        skipped: Names of the others, each with the reason.
        pixels: Hash of all pixels, one image after the other.
    """

    rows: Sequence[Row]
    sizes: Sequence[Size]
    skipped: Mapping[str, str]
    pixels: str


def check_headers(rows: Sequence[Row], how: FolderDecoding) -> dict[str, str]:
    """What is wrong with images by their headers alone, before anything is decoded: name -> reason.

    Raises:
        ValueError: Images cannot be read and are not to be skipped, all have to be of one size and are not, or none
            can be read; all are counted and the first named.
    """
    wrong: dict[str, str] = {}
    where: dict[str, str] = {}
    first: tuple[Row, Size] | None = None
    unlike: list[tuple[Row, Size]] = []
    for row in rows:
        try:
            size = read_header(how.open_image(row))
            if how.framing.buckets is not None:
                how.framing.place(size, how.size)
        except UNREADABLE as error:
            wrong[row.name], where[row.name] = reason_of(error), row.where
            continue
        first = first or (row, size)
        if sorted(size) != sorted(first[1]):  # the sides may be exchanged when it is turned upright
            unlike.append((row, size))
    if wrong and not how.skip:
        raise _unreadable(wrong, where, len(rows))
    if first is None:
        raise ValueError(f"None of the {len(rows)} images can be read. Is it the right folder?")
    if unlike and how.size is None and how.framing.buckets is None:
        (row, size), more = unlike[0], len(unlike) - 1
        raise _wrong_size(row, size, *first, f" and {more} more" if more else "")
    return wrong


def _unreadable(wrong: Mapping[str, str], where: Mapping[str, str], count: int) -> ValueError:
    shown = "; ".join(f"{name} ({where[name]}) cannot be read: {wrong[name]}" for name in list(wrong)[:_SHOWN])
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return ValueError(
        f"{len(wrong)} of {count} images cannot be read, by their headers alone: {shown}{more}. Repair them, remove "
        "them with their rows, or set on_error: skip."
    )


def _wrong_size(row: Row, size: Size, first: Row, size_of_first: Size, more: str = "") -> ValueError:
    return ValueError(
        f"{row.name}{more} has the wrong size: {size[1]}x{size[0]} pixels, while {first.name!r} has "
        f"{size_of_first[1]}x{size_of_first[0]}. Set the option 'size' to resize all to one size."
    )


def decode_rows(
    work: Path,
    *,
    target: Path,
    rows: Sequence[Row],
    contents: Sequence[str],
    how: FolderDecoding,
    progress: Callable[[int, int], None] | None = None,
) -> DecodedRows:
    """Decodes the images of all rows into an image set's folder.

    What was decoded stays in `work` if this stops, and is not decoded again.

    Args:
        work: What is decoded so far; the same settings must find the same folder.
        target: The image set's folder.
        rows: The rows.
        contents: Hash of the file of each row.
        how: How to decode.
        progress: Called with (done, total) images.

    Raises:
        ValueError: An image cannot be read and is not to be skipped, has another size than the others where no size is
            asked for, or none can be read.
        StorageError: A file could not be written.
    """
    record = target / _RECORD
    if not record.exists():
        places, skipped = _decode(work, rows=rows, contents=contents, how=how, progress=progress)
        DecodedPixels(work).finish(target, [place for place in places if place is not None])
        write_json(record, {"sizes": [None if place is None else place[0] for place in places], "skipped": skipped})
    kept = json.loads(record.read_text())  # also of a run that was stopped while it hashed
    sizes = [None if size is None else (int(size[0]), int(size[1])) for size in kept["sizes"]]
    read = [(row, size) for row, size in zip(rows, sizes, strict=True) if size is not None]
    digest = hashlib.blake2b(digest_size=16)
    stream_of(target, [size for _, size in read], digest.update)
    if progress is not None:
        progress(len(rows), len(rows))
    record.unlink()
    return DecodedRows([row for row, _ in read], [size for _, size in read], kept["skipped"], digest.hexdigest())


def _decode(
    work: Path,
    *,
    rows: Sequence[Row],
    contents: Sequence[str],
    how: FolderDecoding,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Place | None], dict[str, str]]:
    """Where each row's image is; and why those that have no place were skipped."""
    skipped = check_headers(rows, how)
    places: list[Place | None] = []
    first: tuple[Row, Place] | None = None
    with DecodedPixels(work) as decoded:
        for index, (row, content) in enumerate(zip(rows, contents, strict=True)):
            if progress is not None:
                progress(index, len(rows))
            place = None if row.name in skipped else decoded.kept(content)
            if place is None and row.name not in skipped:
                try:
                    place = decoded.add(content, load_image(how.open_image(row), how.size, how.framing))
                except UNREADABLE as error:
                    if isinstance(error, StorageError):
                        raise
                    if not how.skip:
                        raise ValueError(
                            f"{row.name} ({row.where}) cannot be read: {reason_of(error)}. It is number {index + 1} of "
                            f"{len(rows)}; those before it are kept and will not be decoded again. Repair it, remove "
                            "it with its row, or set on_error: skip."
                        ) from error
                    skipped[row.name] = reason_of(error)
            places.append(place)
            if place is not None:
                first = first or (row, place)
                if place[0] != first[1][0] and how.size is None and how.framing.buckets is None:
                    raise _wrong_size(row, place[0], first[0], first[1][0])
    if first is None:
        raise ValueError(f"None of the {len(rows)} images can be read. Is it the right folder?")
    return places, {row.name: skipped[row.name] for row in rows if row.name in skipped}
