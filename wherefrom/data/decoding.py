"""Resumable decoding of large captioned image sets: in parts, then joined into one memory-mapped array.

A part (a range of a folder, a shard) is decoded by one worker into its own file. The parts are joined in order and
deleted one by one, so neither workers nor interruptions change the result, and the images are never on disk twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image

from wherefrom.data.framing import AnySize, sides_of
from wherefrom.data.image_files import UNREADABLE
from wherefrom.data.image_set import PIXELS, check_unique, write_pixels_header, write_table
from wherefrom.runtime.artifacts import canonical_json, identity_hash, replacing, storage_errors, write_json
from wherefrom.runtime.mapped_arrays import GrowingArray

DECODED = "decoded.json"
NOT_DECODABLE = (*UNREADABLE, Image.DecompressionBombWarning)
_SHOWN = 5
_logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One decoded image."""

    id: str
    captions: tuple[str, ...]
    pixels: UInt8[NDArray[np.uint8], "h w 3"]
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SkippedItem:
    """An image, file or shard that was skipped, with the reason.

    Attributes:
        name: Name of the image, file or shard.
        kind: Category of the problem, used to count and group.
        detail: Details of this item's problem.
    """

    name: str
    kind: str
    detail: str = ""


def assign_parts(parts: Sequence[T], place: int, places: int) -> list[T]:
    """Selects the parts of one of several workers; every part belongs to exactly one.

    With several nodes of several workers, `place` is node · workers + worker.

    Raises:
        ValueError: `place` is out of range.
    """
    if not 0 <= place < places:
        raise ValueError(f"Worker {place} of {places} does not exist: workers count from 0.")
    return list(parts[place::places])


def part_files(folder: Path, part: int) -> tuple[Path, Path]:
    """Returns the pixel file and the metadata file of a part; the second exists once the part is complete."""
    return folder / f"part-{part:06d}.npy", folder / f"part-{part:06d}.json"


def missing_parts(folder: Path, parts: Sequence[T]) -> list[T]:
    """Of all parts of a folder those that are still to be decoded."""
    if (folder / DECODED).exists():
        return []
    return [each for number, each in enumerate(parts) if not part_files(folder, number)[1].exists()]


def _write_part(
    folder: Path, part: int, samples: Iterator[Sample | SkippedItem], size: AnySize, tick: Callable[[], None]
) -> None:
    """Streams a part to disk: its images are never in memory together."""
    row = (*sides_of(size), 3)
    pixels_file, metadata_file = part_files(folder, part)
    metadata: dict[str, list[Any]] = {"ids": [], "captions": [], "columns": [], "problems": []}
    digest = hashlib.blake2b(digest_size=16)
    with replacing(pixels_file) as temporary, temporary.open("wb") as stream:
        write_pixels_header(stream, (0, *row))
        for sample in samples:
            if isinstance(sample, SkippedItem):
                metadata["problems"].append([sample.name, sample.kind, sample.detail])
                continue
            assert sample.pixels.shape == row
            stream.write(np.ascontiguousarray(sample.pixels).data)
            digest.update(sample.pixels.tobytes())
            metadata["ids"].append(sample.id)
            metadata["captions"].append(list(sample.captions))
            metadata["columns"].append(dict(sample.columns))
            tick()
        stream.seek(0)
        write_pixels_header(stream, (len(metadata["ids"]), *row))
    write_json(metadata_file, {**metadata, "pixels": digest.hexdigest()})


def decode_parts(
    folder: Path,
    *,
    decode: Callable[[int], Iterator[Sample | SkippedItem]],
    counts: Sequence[int],
    size: AnySize,
    workers: int = 1,
    place: int = 0,
    places: int = 1,
    progress: Progress | None = None,
) -> None:
    """Decodes the missing parts of a folder, or one node's share of them.

    Args:
        folder: Folder of the parts; nodes may share it.
        decode: Yields the images of a part, and the skipped items.
        counts: Approximate number of images per part, for the progress.
        size: Side of the images in pixels, or (height, width).
        workers: Number of decoding threads in this process.
        place: Index of this node.
        places: Number of nodes.
        progress: Called with (done, total) images.

    Raises:
        ValueError: `place` is out of range.
        StorageError: The folder could not be written; finished parts are kept.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    mine = assign_parts(range(len(counts)), place, places)
    if (folder / DECODED).exists():  # already joined, by a run that was interrupted before the manifest
        return
    missing = [part for part in mine if not part_files(folder, part)[1].exists()]
    total = sum(counts[part] for part in mine)
    done = total - sum(counts[part] for part in missing)
    lock, stop = threading.Lock(), threading.Event()

    def tick() -> None:
        nonlocal done
        with lock:
            done += 1
            if progress is not None:
                progress(min(done, total), total)

    def work(part: int) -> None:
        def until_stopped() -> Iterator[Sample | SkippedItem]:
            for sample in decode(part):
                if stop.is_set():
                    raise InterruptedError(f"part {part} was stopped")
                yield sample

        _write_part(folder, part, until_stopped(), size, tick)

    # Pillow only warns of images between its limit and twice that; here they are skipped like larger ones.
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if workers <= 1:
            for part in missing:
                work(part)
        else:
            with ThreadPoolExecutor(workers) as pool:
                try:
                    for future in [pool.submit(work, part) for part in missing]:
                        future.result()
                except BaseException:
                    stop.set()
                    pool.shutdown(cancel_futures=True)
                    raise
    if progress is not None and done < total:  # some items were skipped
        progress(total, total)


def join_parts(folder: Path, parts: int, size: AnySize) -> dict[str, Any]:
    """Joins all parts into one table and one pixel array and deletes them; an interrupted join is resumed.

    Returns:
        `fingerprint`, and `problems` as [name, kind, detail].

    Raises:
        ValueError: No image is usable, or an id occurs twice.
        StorageError: A file could not be written.
    """
    if not (folder / DECODED).exists():
        metadata = [json.loads(part_files(folder, part)[1].read_text()) for part in range(parts)]
        ids = [name for each in metadata for name in each["ids"]]
        problems = [problem for each in metadata for problem in each["problems"]]
        if not ids:
            skipped = summarize_skipped([SkippedItem(*each) for each in problems])
            raise ValueError(f"None of the images can be used: {skipped}.")
        check_unique(ids)
        captions = [several for each in metadata for several in each["captions"]]
        rows = [columns for each in metadata for columns in each["columns"]]
        names = sorted({name for row in rows for name in row})
        with GrowingArray(folder / PIXELS, (*sides_of(size), 3), np.uint8) as array:
            for part in range(parts if not array.finished else 0):
                pixels_file, _ = part_files(folder, part)
                if part >= array.note.get("parts", 0):
                    array.append(np.load(pixels_file, mmap_mode="r"), parts=part + 1)
                pixels_file.unlink(missing_ok=True)
            if not array.finished:
                array.finish()
        write_table(folder, ids, captions, {name: [row.get(name, "") for row in rows] for name in names})
        fingerprint = identity_hash(
            {"ids": ids, "captions": canonical_json(captions), "pixels": [each["pixels"] for each in metadata]}
        )
        write_json(folder / DECODED, {"fingerprint": fingerprint, "problems": problems})
    for part in range(parts):
        for file in part_files(folder, part):
            file.unlink(missing_ok=True)
    record: dict[str, Any] = json.loads((folder / DECODED).read_text())
    return record


def stopping(samples: Iterator[Sample | SkippedItem]) -> Iterator[Sample]:
    """The samples, of which none may be skipped.

    Raises:
        ValueError: One was skipped; says why.
    """
    for sample in samples:
        if isinstance(sample, SkippedItem):
            raise ValueError(
                f"{summarize_skipped([sample])}. Repair it, or set on_error: skip; finished parts are kept."
            )
        yield sample


def summarize_skipped(problems: Sequence[SkippedItem]) -> str:
    """Summarises skipped items: counts by kind, and a few names of each."""
    counts = Counter(problem.kind for problem in problems)
    parts = []
    for kind, count in counts.most_common():
        of_kind = (problem for problem in problems if problem.kind == kind)
        names = ", ".join(
            f"{problem.name!r}" + (f" ({problem.detail})" if problem.detail else "")
            for problem in islice(of_kind, _SHOWN)
        )
        parts.append(f"{count} {kind}: {names}{', …' if count > _SHOWN else ''}")
    return "; ".join(parts) or "there are none"


def log_skipped(place: Path, count: int, problems: Sequence[Sequence[str]]) -> None:
    """Logs a warning about skipped items."""
    if problems:
        skipped = summarize_skipped([SkippedItem(*each) for each in problems])
        _logger.warning("%s: %d images are used; skipped were %s", place, count, skipped)
