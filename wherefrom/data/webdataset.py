"""WebDataset shards as written by img2dataset (`00000.tar` beside `00000.parquet`), resized to one size."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL
import pyarrow as pa
import pyarrow.parquet as pq

from wherefrom.data.decoding import (
    NOT_DECODABLE,
    Progress,
    Sample,
    SkippedItem,
    decode_parts,
    join_parts,
    log_skipped,
    stopping,
    summarize_skipped,
)
from wherefrom.data.framing import AnySize, Framing, one_number, sides_of
from wherefrom.data.image_files import load_image
from wherefrom.data.image_metadata import shown
from wherefrom.data.image_set import ImageSet, check_unique, read_image_set
from wherefrom.data.on_error import OnError, checked
from wherefrom.data.shards import IMAGES, ShardSample, check_shard, read_shard
from wherefrom.runtime.artifacts import Store, hash_file, identity_hash, read_manifest
from wherefrom.runtime.mapped_arrays import announce_size
from wherefrom.runtime.stable_names import added_setting, settings_identity

UNDECODABLE, NO_IMAGE, NO_CAPTION, LOST = (
    "images that cannot be decoded",
    "samples without an image",
    "samples without a caption",
    "samples of the table that are not in their shard",
)
_SIZE = 512
_NOT_DECIDING = ("workers", "on_error")  # what is skipped is listed, so that stopping at it needs no decoding
_OWN = frozenset(("id", "captions", "license", "shard"))


@dataclass(frozen=True)
class ShardOptions:
    """Options of reading shards.

    Attributes:
        size: Side in pixels to which every image is cropped (largest centred square) and resized, or (height, width);
            None is 512, or the model's own where an existing model is attributed.
        columns: Columns of the Parquet files to keep.
        license: Column of the licences; without it they are `unknown`.
        largest_member: Members of more bytes than this are skipped unread.
        workers: Number of decoding threads, each with its own shard; does not change the result.
        on_error: Samples that cannot be used are left out and counted (`skip`), or refused (`stop`).
        framing: Padding, EXIF and transparency, where they are not as usual.

    Raises:
        ValueError: An unknown choice, or buckets, which are for folders of images alone.
    """

    size: AnySize | None = None
    columns: tuple[str, ...] = ("url",)
    license: str | None = None
    largest_member: int = 2**26
    workers: int = 1
    on_error: OnError = "skip"
    framing: Framing = added_setting(Framing())

    def __post_init__(self) -> None:
        checked(self.on_error)
        object.__setattr__(self, "size", one_number(self.size))
        self.framing.of_one_size()

    @property
    def side(self) -> AnySize:
        """The size, also where none is said."""
        return _SIZE if self.size is None else self.size


def find_shards(folder: Path) -> list[Path]:
    """Finds the shards of a folder, sorted by name.

    Raises:
        ValueError: There is none, one is empty, or one has no Parquet file beside it.
    """
    shards = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not shards:
        raise ValueError(
            f"{folder} holds no shard. Give the output folder of img2dataset (--output_format webdataset), with "
            "00000.tar beside 00000.parquet."
        )
    for shard in shards:
        check_shard(shard)
        if not shard.with_suffix(".parquet").is_file():
            raise ValueError(
                f"{shard} has no {shard.stem}.parquet beside it, which names its samples. Copy it there, or move the "
                "shard away."
            )
    return shards


def _table(shard: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Reads columns of the Parquet file beside a shard, and `status` if present.

    Raises:
        ValueError: The file cannot be read, or lacks a column.
    """
    path = shard.with_suffix(".parquet")
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in ("key", *columns) if name not in names]
            if missing:
                raise ValueError(
                    f"{path} has no column {missing[0]!r}, only {', '.join(map(repr, names))}. Name columns that it "
                    "has in the options 'columns' and 'license'; 'key' must be there."
                )
            wanted = list(dict.fromkeys(("key", *columns, *(name for name in ("status",) if name in names))))
            table: dict[str, list[Any]] = file.read(columns=wanted).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({error}). Download it again.") from error
    return table


def _keys(shard: Path, columns: Sequence[str]) -> list[str]:
    """Reads the keys that the shard should hold; img2dataset also lists failed downloads."""
    table = _table(shard, columns)
    states = table.get("status", ["success"] * len(table["key"]))
    return [str(key) for key, status in zip(table["key"], states, strict=True) if status == "success"]


def _caption(sample: ShardSample) -> str:
    """Reads the caption from the text member, or else from the JSON member; '' if neither is usable."""
    try:
        text: Any = sample.members.get("txt", b"").decode()
        if not text.strip() and "json" in sample.members:
            metadata = json.loads(sample.members["json"])
            text = metadata.get("caption") if isinstance(metadata, dict) else ""
        if not isinstance(text, str):
            return ""
        text.encode()  # JSON can spell half a surrogate pair
    except (ValueError, RecursionError):
        return ""
    return text.strip()


def decode_shard(
    shard: Path, options: ShardOptions, subset: frozenset[str] | None = None
) -> Iterator[Sample | SkippedItem]:
    """Decodes the images of a shard; yields samples and skipped items.

    Args:
        shard: The tar file.
        options: Options of reading.
        subset: Keys to keep; None keeps all.

    Raises:
        ValueError: The Parquet file cannot be used.
    """
    names = [*options.columns, *((options.license,) if options.license else ())]
    table = _table(shard, names)
    row_of = {str(key): row for row, key in enumerate(table["key"])}
    expected = [key for key in _keys(shard, names) if subset is None or key in subset]
    seen = set()

    def wanted(key: str) -> bool:
        return subset is None or key in subset

    for sample in read_shard(shard, options.largest_member, wanted):
        if isinstance(sample, SkippedItem):
            yield sample
            continue
        if not wanted(sample.key) or sample.key in seen:
            continue
        seen.add(sample.key)
        name, caption = f"{shard.name}: {sample.key}", _caption(sample)
        image = next((sample.members[kind] for kind in sorted(IMAGES & sample.members.keys())), None)
        if image is None:
            yield SkippedItem(name, NO_IMAGE)
        elif not caption:
            yield SkippedItem(name, NO_CAPTION)
        else:
            try:
                pixels = load_image(io.BytesIO(image), options.side, options.framing)
            except NOT_DECODABLE as error:
                # The message contains the buffer's address, which differs between runs.
                detail = type(error).__name__ if "BytesIO" in str(error) else str(error)
                yield SkippedItem(name, UNDECODABLE, detail)
                continue
            row = row_of.get(sample.key)
            cells = {column: "" if row is None else _text(table[column][row]) for column in names}
            terms = (cells.get(options.license) if options.license else None) or "unknown"
            columns = {column: cells[column] for column in options.columns}
            yield Sample(sample.key, (caption,), pixels, {**columns, "license": terms, "shard": shard.name})
    for key in expected:
        if key not in seen:
            yield SkippedItem(f"{shard.name}: {key}", LOST)


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell)


@dataclass(frozen=True)
class Shards:
    """Validated plan of the shards to decode.

    Attributes:
        paths: Shards with wanted samples.
        counts: Expected number of wanted samples per shard.
        subset: Keys to keep; None keeps all.
        identity: Identity of the decoded images.
    """

    paths: tuple[Path, ...]
    counts: tuple[int, ...]
    subset: frozenset[str] | None
    identity: Mapping[str, Any]


def plan_shards(folder: Path, options: ShardOptions = ShardOptions(), subset: Sequence[str] | None = None) -> Shards:
    """Validates shards, Parquet files and keys before anything is decoded.

    Raises:
        ValueError: There is no shard, one is empty, a Parquet file lacks a column, or keys are unknown or occur twice.
    """
    sides_of(options.side)
    if options.largest_member < 1:
        raise ValueError(f"largest_member must be at least 1; given {options.largest_member}.")
    reserved = sorted(_OWN & set(options.columns))
    if reserved:
        raise ValueError(f"columns: {reserved[0]!r} is a reserved column name. Leave it out; see 'license'.")
    names = [*options.columns, *((options.license,) if options.license else ())]
    shards = find_shards(folder)
    keys = [_keys(shard, names) for shard in shards]
    every = [key for several in keys for key in several]
    try:
        check_unique(every)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    chosen = None if subset is None else frozenset(subset)
    unknown = sorted(chosen - set(every)) if chosen is not None else []
    if unknown or chosen == frozenset():
        looks = f"; keys look like {every[0]!r}" if every else ""
        raise ValueError(
            f"subset names {len(unknown)} keys that the shards of {folder} do not have: {shown(unknown)}{looks}. "
            "Correct the list, and name at least one."
        )
    counts = [len(several) if chosen is None else sum(key in chosen for key in several) for several in keys]
    used = [(shard, count) for shard, count in zip(shards, counts, strict=True) if count or chosen is None]
    said = settings_identity(replace(options, size=options.side))
    settings = {name: value for name, value in said.items() if name not in _NOT_DECIDING}
    identity = {
        **settings,
        "columns": list(options.columns),
        # Sizes of the shards, not their contents: they may be terabytes, and are written once.
        "shards": identity_hash({"files": [[path.name, path.stat().st_size] for path, _ in used]}),
        "tables": identity_hash({"files": [hash_file(path.with_suffix(".parquet")) for path, _ in used]}),
        "subset": None if chosen is None else identity_hash({"keys": sorted(chosen)}),
        "pillow": PIL.__version__,
    }
    return Shards(tuple(path for path, _ in used), tuple(count for _, count in used), chosen, identity)


def decode_shards(
    store: Store,
    *,
    shards: Shards,
    options: ShardOptions = ShardOptions(),
    place: int = 0,
    places: int = 1,
    progress: Progress | None = None,
) -> None:
    """Decodes one node's share of the shards, which `build_laion` joins after all nodes have finished.

    Args:
        store: A store shared by all nodes.
        shards: The plan, the same on all nodes.
        options: Options of reading.
        place: Index of this node.
        places: Number of nodes.
        progress: Called with (done, total) images.

    Raises:
        StorageError: The store could not be written; finished shards are kept.
    """

    def decode(part: int) -> Iterator[Sample | SkippedItem]:
        samples = decode_shard(shards.paths[part], options, shards.subset)
        return stopping(samples) if options.on_error == "stop" else samples

    if store.find("laion", shards.identity) is None:
        decode_parts(
            store.partial("laion", shards.identity),
            decode=decode,
            counts=shards.counts,
            size=options.side,
            workers=options.workers,
            place=place,
            places=places,
            progress=progress,
        )


def build_laion(
    store: Store,
    *,
    folder: Path,
    options: ShardOptions = ShardOptions(),
    subset: Sequence[str] | None = None,
    log: Callable[[str], None] = lambda message: None,
    progress: Progress | None = None,
) -> ImageSet:
    """Builds the image set of shards in their order, or loads it from the store; ids are img2dataset's keys.

    Columns: `license`, `shard`, and `options.columns`. Damaged samples are skipped, and listed in the manifest.

    Args:
        store: Where the images, and finished shards of an interrupted run, are kept.
        folder: The output folder of img2dataset.
        options: Options of reading.
        subset: Keys to keep; None keeps all.
        log: Receives a message with the size on disk before decoding.
        progress: Called with (done, total) images while they are decoded.

    Raises:
        ValueError: Shards, Parquet files or keys cannot be used, or no image is usable.
        StorageError: The store could not be written; finished shards are kept.
    """
    shards = plan_shards(folder, options, subset)

    def build(partial: Path) -> Mapping[str, Any]:
        count = sum(shards.counts)
        height, width = sides_of(options.side)
        what = f"{count:,} images of {width} × {height} pixels from {len(shards.paths)} shards"
        announce_size(log, what, count * height * width * 3, store.root)
        decode_shards(store, shards=shards, options=options, progress=progress)
        return join_parts(partial, len(shards.paths), options.side)

    artifact = store.make("laion", shards.identity, build)
    images, problems = read_image_set(artifact), read_manifest(artifact)["problems"]
    if problems and options.on_error == "stop":
        raise ValueError(
            f"{folder}: {summarize_skipped([SkippedItem(*each) for each in problems])}. Repair them, or set "
            "on_error: skip, which leaves them out."
        )
    log_skipped(folder, len(images), problems)
    return images
