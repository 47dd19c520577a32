"""Captioned image sets on disk: a Parquet table (one row per image), `pixels.npy` and a manifest.

Images of several sizes are kept in one file for each size, beside `sizes.npy`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from wherefrom.data.ragged_pixels import Pixels, RaggedPixels, by_size, join_pixels, sizes_of, take_pixels
from wherefrom.data.repeats import REPEATS, parse_repeats, weighted_fingerprint
from wherefrom.models.image_sizes import Size
from wherefrom.runtime.artifacts import identity_hash, read_manifest, replacing

TABLE = "pictures.parquet"
PIXELS = "pixels.npy"
SIZES = "sizes.npy"  # (height, width) of every image, where they have several sizes


@dataclass(frozen=True)
class ImageSet:
    """Captioned images, in the order of their ids.

    Attributes:
        ids: Unique string ids that the data set owns (never positions).
        captions: The captions of each image; every image has the same number of them.
        pixels: uint8 RGB, shape (N, H, W, 3); may be memory-mapped, or a view of a memory-mapped array. Images of
            several sizes (aspect buckets) are `RaggedPixels`, which give one image or images of one size.
        columns: Further columns, one string per image: `license` always, and groups such as `author`, `style`. The
            column `repeats` has a meaning: see `weights`.
        fingerprint: Hash of ids, captions and pixels; part of the identity of every artifact built from them.
        joined_from: The sets that this one is the concatenation of, if any; see `parts`.
        skipped: Names of images of the same source that could not be read and were left out.
    """

    ids: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    pixels: Pixels
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fingerprint: str = ""
    joined_from: tuple[ImageSet, ...] = ()
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __post_init__(self) -> None:
        check_unique(self.ids)
        counts = {len(captions) for captions in self.captions}
        if len(counts) > 1:
            raise ValueError(f"Images must have equally many captions each; found {sorted(counts)}.")

    @cached_property
    def weights(self) -> Float[NDArray[np.float64], " n"] | None:
        """How often training sees each image, by the column `repeats`; None where it sees each once.

        Training descends the weighted mean Σ wᵢ ℓᵢ / Σ wᵢ of the images' losses.

        Raises:
            ValueError: A cell of the column is no positive whole number.
        """
        return parse_repeats(self.ids, self.columns[REPEATS]) if REPEATS in self.columns else None

    @property
    def seen(self) -> int:
        """Number of images that an epoch of training sees: Σ wᵢ, the number of images where each is seen once."""
        return len(self) if self.weights is None else int(self.weights.sum())

    @property
    def weighted_fingerprint(self) -> str:
        """The fingerprint with the weights, for what depends on them; the plain one where each image is seen once."""
        return weighted_fingerprint(self.fingerprint, self.weights)

    @property
    def parts(self) -> tuple[ImageSet, ...]:
        """The concatenated sets, so that artifacts of each part are reused; the set itself if it was not joined."""
        if self.joined_from and self.fingerprint == _joined_fingerprint(self.joined_from):
            return tuple(part for each in self.joined_from for part in each.parts)
        return (self,)

    def subset(self, indices: Sequence[int] | NDArray[np.intp]) -> ImageSet:
        """Selects the images at these positions, in this order."""
        chosen = [int(index) for index in indices]
        return ImageSet(
            ids=tuple(self.ids[index] for index in chosen),
            captions=tuple(self.captions[index] for index in chosen),
            pixels=take_pixels(self.pixels, np.asarray(chosen, dtype=np.intp)),
            columns={name: tuple(column[index] for index in chosen) for name, column in self.columns.items()},
            fingerprint=self.fingerprint,
            skipped=self.skipped,
        )

    @property
    def sizes(self) -> list[Size]:
        """(height, width) of every image."""
        return sizes_of(self.pixels)

    @property
    def distinct_sizes(self) -> list[Size]:
        """Every (height, width) that occurs, in order."""
        return sorted(size for size, _ in by_size(self.pixels))

    def by_size(self) -> Iterator[tuple[Size, ImageSet, NDArray[np.intp]]]:
        """The images of each size, with their positions here."""
        for size, positions in by_size(self.pixels):
            yield size, self.subset(positions) if isinstance(self.pixels, RaggedPixels) else self, positions

    def where(self, column: str, value: str) -> ImageSet:
        """Selects the images whose column has this value."""
        return self.subset([index for index, cell in enumerate(self.columns[column]) if cell == value])


def joined_image_sets(first: ImageSet, second: ImageSet) -> ImageSet:
    """Concatenates two image sets; the first may stay memory-mapped.

    Raises:
        ValueError: An id is in both, sizes or numbers of captions differ, or a column is in one only.
    """
    ragged = isinstance(first.pixels, RaggedPixels) or isinstance(second.pixels, RaggedPixels)
    if not ragged and first.pixels.shape[1:] != second.pixels.shape[1:]:
        raise ValueError(f"Images of {first.pixels.shape[1:]} and of {second.pixels.shape[1:]} cannot be one set.")
    if set(first.columns) != set(second.columns):
        raise ValueError(f"Columns differ: {sorted(first.columns)} and {sorted(second.columns)}.")
    return ImageSet(
        first.ids + second.ids,
        first.captions + second.captions,
        join_pixels(first.pixels, second.pixels),
        {name: column + second.columns[name] for name, column in first.columns.items()},
        _joined_fingerprint((first, second)),
        (first, second),
        tuple(dict.fromkeys(first.skipped + second.skipped)),
    )


def _joined_fingerprint(parts: Sequence[ImageSet]) -> str:
    return identity_hash(
        {"of": [part.fingerprint for part in parts], "ids": [name for part in parts for name in part.ids]}
    )


def check_unique(ids: Iterable[str]) -> None:
    """Raises if ids are not unique.

    Raises:
        ValueError: Ids occur more than once; names them.
    """
    seen: set[str] = set()
    twice: set[str] = set()
    for name in ids:
        (twice if name in seen else seen).add(name)
    if twice:
        shown = ", ".join(repr(name) for name in sorted(twice)[:5])
        raise ValueError(
            f"{len(twice)} image ids occur more than once: {shown}. Ids must be unique; rename the images."
        )


def read_ids(given: Sequence[str] | str | Path | None, option: str = "exclude") -> tuple[str, ...]:
    """Reads ids from a list, or from a text file with one id per line.

    Args:
        given: The list or the file.
        option: Name of the user's option, for errors.

    Raises:
        ValueError: The file is missing.
    """
    if given is None:
        return ()
    if isinstance(given, str | Path):
        path = Path(given)
        if not path.is_file():
            raise ValueError(
                f"{option}: {path} is not a file. Give a list of ids, or a text file with one id per line."
            )
        return tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    return tuple(given)


def keep_indices(ids: Sequence[str], exclude: Sequence[str]) -> list[int]:
    """Computes the positions of the ids that are not excluded.

    Raises:
        ValueError: An excluded id is not in the data set.
    """
    unknown = sorted(set(exclude) - set(ids))
    if unknown:
        raise ValueError(
            f"exclude names {len(unknown)} ids that the data set does not have, such as {unknown[0]!r}; "
            + (f"its ids look like {ids[0]!r}. " if ids else "it is empty. ")
            + "Correct the list: an id that excludes nothing would spoil a leave-out run."
        )
    dropped = set(exclude)
    return [index for index, name in enumerate(ids) if name not in dropped]


def write_table(
    folder: Path, ids: Sequence[str], captions: Sequence[Sequence[str]], columns: Mapping[str, Sequence[str]]
) -> None:
    """Writes the table, one row per image.

    Raises:
        StorageError: The folder could not be written.
    """
    assert not {"id", "captions"} & columns.keys(), "these two column names are reserved"
    further = {name: list(column) for name, column in columns.items()}
    table = pa.table({"id": list(ids), "captions": [list(several) for several in captions], **further})
    with replacing(folder / TABLE) as temporary:
        pq.write_table(table, temporary)


def write_pixels_header(stream: BinaryIO, shape: tuple[int, ...]) -> None:
    """Writes the header of a `.npy` file of uint8; its length does not depend on the first dimension."""
    np.lib.format.write_array_header_2_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})


def write_image_set(
    folder: Path,
    ids: Sequence[str],
    captions: Sequence[Sequence[str]],
    pixels: UInt8[NDArray[np.uint8], "n h w 3"],
    columns: Mapping[str, Sequence[str]],
) -> None:
    """Writes the table and the pixels.

    Raises:
        StorageError: The folder could not be written.
    """
    write_table(folder, ids, captions, columns)
    with replacing(folder / PIXELS) as temporary, temporary.open("wb") as stream:
        # Not np.save: on a full disk its error carries no errno, which `storage_errors` needs.
        write_pixels_header(stream, pixels.shape)
        stream.write(np.ascontiguousarray(pixels).data)


def read_image_set(folder: Path) -> ImageSet:
    """Reads images written by `write_image_set` or decoded in parts; the pixels are memory-mapped.

    Raises:
        FileNotFoundError: The folder is not a complete artifact.
    """
    manifest: dict[str, Any] = read_manifest(folder)
    columns = pq.read_table(folder / TABLE).to_pydict()
    ids, captions = columns.pop("id"), columns.pop("captions")
    return ImageSet(
        ids=tuple(ids),
        captions=tuple(tuple(c) for c in captions),
        pixels=_read_pixels(folder),
        columns={name: tuple(column) for name, column in columns.items()},
        fingerprint=manifest["fingerprint"],
        skipped=tuple(manifest.get("skipped") or [name for name, *_ in manifest.get("problems", ())]),
    )


def pixels_of_size(size: Size) -> str:
    """Name of the file of a size's pixels, where there are several sizes."""
    return f"pixels-{size[0]}x{size[1]}.npy"


def _read_pixels(folder: Path) -> Pixels:
    if not (folder / SIZES).exists():
        return np.load(folder / PIXELS, mmap_mode="r")  # type: ignore[no-any-return]
    sizes = [(height, width) for height, width in np.load(folder / SIZES).tolist()]
    arrays = [np.load(folder / pixels_of_size(size), mmap_mode="r") for size in sorted(set(sizes))]
    return RaggedPixels.in_order(arrays, sizes)
