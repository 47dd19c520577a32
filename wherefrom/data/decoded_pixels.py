"""Pixels that were decoded so far: kept by the content of their files while a folder is being read.

A reading that stops (a damaged image, a full disk, a killed process) leaves what it decoded here, and the next one
takes it up, also where images were repaired, added or removed in between. `decoded.jsonl` says which rows are safely on
disk.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from wherefrom.data.image_set import PIXELS, SIZES, pixels_of_size, write_pixels_header
from wherefrom.models.image_sizes import Size
from wherefrom.runtime.artifacts import replacing, storage_errors
from wherefrom.runtime.mapped_arrays import write_array

_RECORD = "decoded.jsonl"
_IMAGES, _BYTES = 64, 2**26  # images, or bytes, after which they are made safe
_BLOCK = 2**22  # bytes that are copied at a time
Place = tuple[Size, int]  # an image's size, and its row among those of that size


class DecodedPixels:
    """Append-only pixels of each size; a context, at whose end everything is safe.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: dict[Size, int] = {}
        self._kept: dict[str, deque[Place]] = defaultdict(deque)
        self._streams: dict[Size, BinaryIO] = {}
        self._pending: list[tuple[str, Size]] = []
        self._bytes = 0

    def __enter__(self) -> DecodedPixels:
        with storage_errors(self.folder / PIXELS):
            self.folder.mkdir(parents=True, exist_ok=True)
            whole = 0
            for key, size, length in self._records():
                self._kept[key].append((size, self.counts.get(size, 0)))
                self.counts[size] = self.counts.get(size, 0) + 1
                whole += length
            self._record = (self.folder / _RECORD).open("ab")
            self._record.truncate(whole)  # a line may have been cut short
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._make_safe()
        finally:
            for stream in (*self._streams.values(), self._record):
                with suppress(OSError):  # all is safe, or the error is under way already
                    stream.close()

    def kept(self, key: str) -> Place | None:
        """Where an image of this content is, of each place once; None if it has to be decoded."""
        places = self._kept.get(key)
        return places.popleft() if places else None

    def add(self, key: str, pixels: UInt8[NDArray[np.uint8], "h w 3"]) -> Place:
        """Appends an image.

        Args:
            key: Hash of the file's content.
            pixels: The image.

        Raises:
            StorageError: The disk is full; what was made safe before stays.
        """
        size = int(pixels.shape[0]), int(pixels.shape[1])
        with storage_errors(self.folder / PIXELS):
            self._stream(size).write(np.ascontiguousarray(pixels).data)
        place = size, self.counts.get(size, 0)
        self.counts[size] = place[1] + 1
        self._pending.append((key, size))
        self._bytes += pixels.nbytes
        if len(self._pending) >= _IMAGES or self._bytes >= _BYTES:
            self._make_safe()
        return place

    def _stream(self, size: Size) -> BinaryIO:
        if size not in self._streams:
            path = self.folder / pixels_of_size(size)
            stream = path.open("r+b" if path.exists() else "w+b")
            write_pixels_header(stream, (0, *size, 3))
            stream.truncate(stream.tell() + self.counts.get(size, 0) * size[0] * size[1] * 3)
            stream.seek(0, os.SEEK_END)
            self._streams[size] = stream
        return self._streams[size]

    def _records(self) -> list[tuple[str, Size, int]]:
        """Content, size and length in bytes of each line; none if a file is shorter than they say."""
        lines = list(_lines(self.folder / _RECORD))
        for size, count in Counter(size for _, size, _ in lines).items():
            path = self.folder / pixels_of_size(size)
            if not path.exists() or path.stat().st_size < count * size[0] * size[1] * 3:
                return []
        return lines

    def _make_safe(self) -> None:
        """Brings the pixels to disk, then the lines that say so."""
        pending, self._pending, self._bytes = self._pending, [], 0
        if not pending:
            return
        with storage_errors(self.folder / PIXELS):
            for size in dict.fromkeys(size for _, size in pending):
                self._streams[size].flush()
                os.fsync(self._streams[size].fileno())
            self._record.write(b"".join(json.dumps([key, *size]).encode() + b"\n" for key, size in pending))
            self._record.flush()
            os.fsync(self._record.fileno())

    def finish(self, target: Path, places: Sequence[Place]) -> None:
        """Writes the images of these places, in this order, as an image set's pixels, and empties the folder.

        Call it outside of the context, of a new object as well. What is in order already is moved and not copied.

        Args:
            target: The image set's folder.
            places: Where the images are.
        """
        counts = Counter(size for _, size, _ in self._records())
        sizes = sorted({size for size, _ in places})
        for size in sizes:
            rows = [row for one, row in places if one == size]
            source = self.folder / pixels_of_size(size)
            final = target / (PIXELS if len(sizes) == 1 else pixels_of_size(size))
            if rows == list(range(counts[size])):
                with storage_errors(final), source.open("r+b") as stream:
                    write_pixels_header(stream, (len(rows), *size, 3))
                    os.fsync(stream.fileno())
                source.replace(final)
            else:
                with source.open("r+b") as stream:
                    write_pixels_header(stream, (counts[size], *size, 3))
                write_array(final, (len(rows), *size, 3), _blocks(np.load(source, mmap_mode="r"), rows), np.uint8)
        if len(sizes) > 1:
            with replacing(target / SIZES) as temporary, temporary.open("wb") as stream:
                np.save(stream, np.array([size for size, _ in places], dtype=np.int32))
        for path in (self.folder / _RECORD, *self.folder.glob("pixels-*.npy")):
            path.unlink(missing_ok=True)
        self.folder.rmdir()


def _lines(path: Path) -> Iterator[tuple[str, Size, int]]:
    """Content, size and length in bytes of each whole line."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for line in stream:
            try:
                key, height, width = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n"):
                return
            yield key, (height, width), len(line)


def _blocks(array: NDArray[np.uint8], rows: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """Some rows, a few at a time."""
    step = max(1, _BLOCK // max(1, int(array[:1].nbytes)))
    for start in range(0, len(rows), step):
        yield array[list(rows[start : start + step])]


def stream_of(folder: Path, sizes: Sequence[Size], use: Callable[[Any], None]) -> None:
    """Hands the pixels of an image set's folder on in the order of the images, a few at a time.

    Args:
        folder: The image set's folder.
        sizes: (height, width) of every image.
        use: Receives the bytes.
    """
    kinds = sorted(set(sizes))
    names = {size: PIXELS if len(kinds) == 1 else pixels_of_size(size) for size in kinds}
    arrays = {size: np.load(folder / name, mmap_mode="r") for size, name in names.items()}
    if len(kinds) == 1:
        for start in range(0, len(sizes), _IMAGES):
            use(arrays[kinds[0]][start : start + _IMAGES].data)
        return
    seen = dict.fromkeys(kinds, 0)
    for size in sizes:
        use(np.ascontiguousarray(arrays[size][seen[size]]).data)
        seen[size] += 1
