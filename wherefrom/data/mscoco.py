"""COCO: image folders with a JSON file of captions, resized to one size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL

from wherefrom.data.coco_captions import CocoImage, read_captions
from wherefrom.data.decoding import (
    NOT_DECODABLE,
    Progress,
    Sample,
    SkippedItem,
    decode_parts,
    join_parts,
    log_skipped,
    missing_parts,
)
from wherefrom.data.framing import AnySize, Framing, one_number, sides_of
from wherefrom.data.image_files import load_image, unreadable_headers
from wherefrom.data.image_metadata import shown
from wherefrom.data.image_set import ImageSet, read_image_set
from wherefrom.data.on_error import OnError, checked, reading_identity, takes_skip_unreadable
from wherefrom.runtime.artifacts import Store, hash_file, identity_hash, read_manifest
from wherefrom.runtime.mapped_arrays import announce_size
from wherefrom.runtime.stable_names import added_setting

_PART = 256  # images per part: fixed, since the fingerprint is computed from the parts' hashes
_SIZE = 128
UNREADABLE_IMAGE = "cannot be read"


@takes_skip_unreadable
@dataclass(frozen=True)
class CocoOptions:
    """Options of reading COCO.

    Attributes:
        size: Side in pixels to which every image is cropped (largest centred square) and resized, or (height, width);
            None is 128, the papers', or the model's own where an existing model is attributed.
        captions: Number of captions per image: the first ones, in the order of the JSON file.
        on_error: `skip` leaves out images that cannot be read instead of raising; they are logged, and listed in the
            manifest.
        workers: Number of decoding threads; does not change the result.
        framing: Padding, EXIF and transparency, where they are not as usual.

    Raises:
        ValueError: An unknown choice, or buckets, which are for folders of images alone.
    """

    size: AnySize | None = None
    captions: int = 5
    on_error: OnError = "stop"
    workers: int = 1
    framing: Framing = added_setting(Framing())

    def __post_init__(self) -> None:
        checked(self.on_error)
        object.__setattr__(self, "size", one_number(self.size))
        self.framing.of_one_size()

    @property
    def side(self) -> AnySize:
        """The size, also where none is said."""
        return _SIZE if self.size is None else self.size


def _sizes(folder: Path, images: Sequence[CocoImage]) -> str:
    """Hashes names and sizes of all files.

    Unlike for a user's folder, not their bytes: COCO's 19 GB are published once and never edited.

    Raises:
        ValueError: The folder or a file is missing, or a file lies elsewhere.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Unpack COCO's train2017.zip or val2017.zip there.")
    sizes: dict[str, int] = {}
    for place in sorted({image.file_name.rpartition("/")[0] for image in images}):
        below = folder / place
        if place and not Path(os.path.realpath(below)).is_relative_to(os.path.realpath(folder)):
            raise ValueError(f"{below} leads out of {folder}. Put the images themselves there.")
        if below.is_dir():
            with os.scandir(below) as entries:
                inside = f"{place}/" if place else ""
                sizes |= {inside + entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    missing = [image.file_name for image in images if image.file_name not in sizes]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(images)} images: {shown(missing)}. Unpack the archive again, or "
            "name the images that are there in the option 'subset'."
        )
    return identity_hash({"files": [[image.file_name, sizes[image.file_name]] for image in images]})


def _check_headers(folder: Path, images: Sequence[CocoImage], options: CocoOptions) -> None:
    """Refuses images that cannot be read by their headers, all at once and before any is decoded.

    Raises:
        ValueError: There are some.
    """
    wrong = unreadable_headers([(each.file_name, folder / each.file_name) for each in images], options.workers)
    if wrong:
        first = "; ".join(f"{folder / name} cannot be read: {reason}" for name, reason in list(wrong.items())[:5])
        raise ValueError(
            f"{len(wrong)} of {len(images)} images cannot be read, by their headers alone: {first}"
            f"{'; …' if len(wrong) > 5 else ''}. Unpack them again, name the others in subset, or set on_error: skip."
        )


def build_mscoco(
    store: Store,
    *,
    folder: Path,
    captions: Path,
    options: CocoOptions = CocoOptions(),
    subset: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    log: Callable[[str], None] = lambda message: None,
    progress: Progress | None = None,
) -> ImageSet:
    """Builds COCO's image set in the numerical order of the ids, or loads it from the store.

    Columns: `license` (the licence's name in the JSON file), `file_name`, `url`.

    Args:
        store: Where the images, and finished parts of an interrupted run, are kept.
        folder: Image folder, such as `train2017`.
        captions: The captions file, such as `annotations/captions_train2017.json`; see `read_captions`.
        options: Options of reading.
        subset: Ids to keep; None keeps all.
        splits: Splits to keep of a file whose images name theirs; None keeps all.
        log: Receives a message with the size on disk before decoding.
        progress: Called with (done, total) images while they are decoded.

    Raises:
        ValueError: The file, the folder or an image cannot be used.
        StorageError: The store could not be written; finished parts are kept.
    """
    options = replace(options, size=options.side)
    height, width = sides_of(options.side)
    if options.captions < 1:
        raise ValueError(f"captions must be at least 1; given {options.captions}.")
    images = read_captions(captions, options.captions, subset, splits)
    settings = {name: value for name, value in reading_identity(options).items() if name != "workers"}
    identity = {
        **settings,
        "captions_file": hash_file(captions),
        "files": _sizes(folder, images),
        "pillow": PIL.__version__,
    }
    parts = [images[start : start + _PART] for start in range(0, len(images), _PART)]

    def decode(part: int) -> Iterator[Sample | SkippedItem]:
        for image in parts[part]:
            try:
                pixels = load_image(folder / image.file_name, options.size, options.framing)
            except NOT_DECODABLE as error:
                if options.on_error == "stop":
                    raise ValueError(
                        f"{folder / image.file_name} cannot be read: {error}. Unpack it again, name the others in "
                        "subset, or set on_error: skip; finished parts are kept."
                    ) from error
                yield SkippedItem(image.file_name, UNREADABLE_IMAGE, str(error))
            else:
                columns = {"license": image.license, "file_name": image.file_name, "url": image.url}
                yield Sample(image.id, image.captions, pixels, columns)

    def build(partial: Path) -> Mapping[str, Any]:
        size = len(images) * height * width * 3
        announce_size(log, f"{len(images):,} images of {width} × {height} pixels", size, store.root)
        if options.on_error == "stop":
            _check_headers(folder, [image for part in missing_parts(partial, parts) for image in part], options)
        decode_parts(
            partial,
            decode=decode,
            counts=[len(part) for part in parts],
            size=options.side,
            workers=options.workers,
            progress=progress,
        )
        return join_parts(partial, len(parts), options.side)

    artifact = store.make("mscoco", identity, build)
    image_set = read_image_set(artifact)
    log_skipped(folder, len(image_set), read_manifest(artifact)["problems"])
    return image_set
