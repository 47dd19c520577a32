"""Decoding of a folder's rows of images into one array on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from wherefrom.data.image_files import UNREADABLE, load_image
from wherefrom.data.image_metadata import Row
from wherefrom.data.image_set import write_pixels_header
from wherefrom.runtime.artifacts import replacing


def decode_rows(
    path: Path,
    rows: Sequence[Row],
    *,
    open_image: Callable[[Row], Path | BinaryIO],
    size: int | None,
    skip: bool,
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
                pixels = load_image(open_image(row), size)
            except UNREADABLE as error:
                if not skip:
                    raise ValueError(
                        f"{row.name} ({row.where}) cannot be read: {error}. Repair it, remove it with its "
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
                    f"{row.name} has the wrong size: {pixels.shape[1]}x{pixels.shape[0]} pixels, while "
                    f"{read[0].name!r} has {shape[1]}x{shape[0]}. Set the option 'size' to resize all to one size."
                )
            read.append(row)
            stream.write(pixels.data)
            digest.update(pixels.data)
        if not read:
            raise ValueError(f"None of the {len(rows)} images can be read. Is it the right folder?")
        stream.seek(0)
        write_pixels_header(stream, (len(read), *shape))
        assert stream.tell() == start, "the header must not grow into the pixels"
    if progress is not None:
        progress(len(rows), len(rows))
    return read, skipped, digest.hexdigest()
