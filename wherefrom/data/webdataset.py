"""WebDataset shards, such as img2dataset's (`00000.tar` beside `00000.parquet`), resized to one size."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL

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
from wherefrom.data.shard_tables import Shard, find_shards
from wherefrom.data.shards import ShardSample, image_kinds, read_shard
from wherefrom.runtime.artifacts import Store, identity_hash, read_manifest
from wherefrom.runtime.mapped_arrays import announce_size
from wherefrom.runtime.stable_names import added_setting, settings_identity

UNDECODABLE, NO_IMAGE, NO_CAPTION, LOST, SEVERAL_IMAGES = (
    "images that cannot be decoded",
    "samples without an image",
    "samples without a caption",
    "samples of the table that are not in their shard",
    "samples with several images, of which the option 'image' names none",
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
        image: Kind of the member that is the image, such as `input.jpg`, where a sample holds several.
        caption: Kind of the member that is the caption, such as `cls` or `prompt.txt`; None takes `txt`, `caption`, or
            `caption` of the JSON member.
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
    image: str | None = added_setting(None)
    caption: str | None = added_setting(None)

    def __post_init__(self) -> None:
        checked(self.on_error)
        for name in ("image", "caption"):
            kind = getattr(self, name)
            if kind is not None:  # kinds are compared without regard to case, and without the dot before them
                object.__setattr__(self, name, kind.lower().lstrip("."))
        object.__setattr__(self, "size", one_number(self.size))
        self.framing.of_one_size()

    @property
    def side(self) -> AnySize:
        """The size, also where none is said."""
        return _SIZE if self.size is None else self.size


def _metadata(sample: ShardSample) -> dict[str, Any]:
    """The JSON member, if it can be read."""
    try:
        made = json.loads(sample.members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return made if isinstance(made, dict) else {}


def _caption(sample: ShardSample, metadata: Mapping[str, Any], member: str | None) -> str | None:
    """Reads the caption from the member that is asked for, or else the text members or the JSON member.

    A text member that is empty is an empty caption, unless the JSON member says that there is none.

    Returns:
        None if there is no caption that can be used.
    """
    texts = [sample.members[kind] for kind in ((member,) if member else ("txt", "caption")) if kind in sample.members]
    named = [] if member else [metadata[name] for name in ("caption", "text") if name in metadata]
    said: list[str] = []
    for value in [*texts, *named]:
        try:
            text = value.decode() if isinstance(value, bytes) else value
            if isinstance(text, str):
                text.encode()  # JSON can spell half a surrogate pair
                said.append(text.strip())
        except ValueError:
            continue
    if named and not any(isinstance(value, str) for value in named):
        said = [text for text in said if text]  # img2dataset writes an empty text where there was no caption
    return next((text for text in said if text), said[0] if said else None)


def decode_shard(
    shard: Shard | Path, options: ShardOptions, subset: frozenset[str] | None = None
) -> Iterator[Sample | SkippedItem]:
    """Decodes the images of a shard; yields samples and skipped items.

    Args:
        shard: The shard, or the tar file of one.
        options: Options of reading.
        subset: Ids to keep; None keeps all.

    Raises:
        ValueError: The Parquet file cannot be used.
    """
    shard = Shard(shard, shard.name) if isinstance(shard, Path) else shard
    names = [*options.columns, *((options.license,) if options.license else ())]
    table, prefix = shard.read_table(names), shard.prefix
    row_of = {} if table is None else {str(key): row for row, key in enumerate(table["key"])}
    seen = set()

    def wanted(key: str) -> bool:
        return subset is None or prefix + key in subset

    expected = [] if table is None else [key for key in shard.keys(names) if wanted(key)]
    further = [kind for kind in (options.image, options.caption) if kind is not None]
    for sample in read_shard(shard.path, options.largest_member, wanted, further):
        if isinstance(sample, SkippedItem):
            yield replace(sample, name=prefix + sample.name)
            continue
        if not wanted(sample.key) or sample.key in seen:
            continue
        seen.add(sample.key)
        name, metadata = f"{shard.name}: {sample.key}", _metadata(sample)
        caption = _caption(sample, metadata, options.caption)
        found = image_kinds(sample.members) if options.image is None else [options.image]
        if len(found) > 1:
            yield SkippedItem(name, SEVERAL_IMAGES, ", ".join(found))
        elif not found or found[0] not in sample.members:
            yield SkippedItem(name, NO_IMAGE)
        elif caption is None:
            yield SkippedItem(name, NO_CAPTION)
        else:
            try:
                pixels = load_image(io.BytesIO(sample.members[found[0]]), options.side, options.framing)
            except NOT_DECODABLE as error:
                # The message contains the buffer's address, which differs between runs.
                detail = type(error).__name__ if "BytesIO" in str(error) else str(error)
                yield SkippedItem(name, UNDECODABLE, detail)
                continue
            row = row_of.get(sample.key)
            if table is None:
                cells = {column: _text(metadata.get(column)) for column in names}
            else:
                cells = {column: "" if row is None else _text(table[column][row]) for column in names}
            terms = (cells.get(options.license) if options.license else None) or "unknown"
            columns = {column: cells[column] for column in options.columns}
            yield Sample(prefix + sample.key, (caption,), pixels, {**columns, "license": terms, "shard": shard.name})
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
        subset: Ids to keep; None keeps all.
        identity: Identity of the decoded images.
    """

    paths: tuple[Shard, ...]
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
        raise ValueError(f"columns: {reserved[0]!r} is a reserved column name. Leave it out; see the option 'license'.")
    names = [*options.columns, *((options.license,) if options.license else ())]
    shards = find_shards(folder)
    for shard in shards:
        shard.check_kinds(options.image)
    listed = [shard.keys(names) for shard in shards]
    keys = [[shard.prefix + key for key in several] for shard, several in zip(shards, listed, strict=True)]
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
    used = [each for each in zip(shards, counts, listed, strict=True) if each[1] or chosen is None]
    said = settings_identity(replace(options, size=options.side))
    settings = {name: value for name, value in said.items() if name not in _NOT_DECIDING}
    identity = {
        **settings,
        "columns": list(options.columns),
        # Sizes of the shards, not their contents: they may be terabytes, and are written once.
        "shards": identity_hash({"files": [[shard.name, shard.path.stat().st_size] for shard, _, _ in used]}),
        "tables": identity_hash({"files": [shard.content(several) for shard, _, several in used]}),
        "subset": None if chosen is None else identity_hash({"keys": sorted(chosen)}),
        "pillow": PIL.__version__,
    }
    return Shards(tuple(shard for shard, _, _ in used), tuple(count for _, count, _ in used), chosen, identity)


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
    """Builds the image set of shards in their order, or loads it from the store; ids are the keys.

    Keys of shards in subfolders have the subfolder's path before them. Columns: `license`, `shard`, and
    `options.columns`. Damaged samples are skipped, and listed in the manifest.

    Args:
        store: Where the images, and finished shards of an interrupted run, are kept.
        folder: The output folder of img2dataset, or any folder with shards in it or below.
        options: Options of reading.
        subset: Ids to keep; None keeps all.
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
