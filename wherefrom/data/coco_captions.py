"""Captions files of COCO's family: COCO's own, and Karpathy's splits of COCO and Flickr (`dataset_coco.json`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from wherefrom.data.image_metadata import shown
from wherefrom.data.image_set import check_unique

_Id = int | str


@dataclass(frozen=True)
class CocoImage:
    """Metadata of one image in the JSON file.

    Attributes:
        id: Its id, as text.
        file_name: Its path below the image folder.
        captions: As many as were asked for.
        license: Name of its licence.
        url: Where it comes from.
        split: In Karpathy's files one of train, restval, val and test.
    """

    id: str
    file_name: str
    captions: tuple[str, ...]
    license: str
    url: str
    split: str = ""


@dataclass
class _Entry:
    """An image of the file with all its captions."""

    id: str
    file_name: str
    license: str = "unknown"
    url: str = ""
    split: str = ""
    captions: list[str] = field(default_factory=list)


def read_captions(
    path: Path, captions: int = 5, subset: Sequence[str] | None = None, splits: Sequence[str] | None = None
) -> list[CocoImage]:
    """Reads a captions file, in the numerical order of the image ids, as the papers do; other ids are in theirs.

    An image whose captions are empty is one without words; only what has too few captions at all is refused, and
    images that are not asked for may have any number.

    Args:
        path: COCO's captions file, or Karpathy's.
        captions: Number of captions of each image: the first ones that say something.
        subset: Ids to keep; None keeps all.
        splits: Splits of Karpathy's file to keep; None keeps all.

    Raises:
        ValueError: The file is missing, has another layout, names an image twice, or an image has too few captions; or
            an id or a split is asked for that it does not have.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file. Unpack COCO's annotations_trainval2017.zip beside the image folders.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: give COCO's captions file, such as captions_train2017.json.")
    entries = _karpathy_entries(path, content) if is_karpathy(content) else _coco_entries(path, content)
    entries = _of_splits(path, entries, splits)
    entries = entries if subset is None else _of_subset(path, entries, subset)
    made = [(entry, _first(entry.captions, captions)) for entry in entries]
    for minimum, what in ((1, "no caption"), (captions, f"fewer than {captions} captions")):
        short = [entry.id for entry, several in made if len(several) < minimum]
        if short:
            raise ValueError(
                f"{path}: {len(short)} images have {what}: {shown(short)}. Add what is missing, leave the images out "
                "by the option 'subset', or ask for fewer captions in the option 'captions'."
            )
    result = [CocoImage(each.id, each.file_name, several, each.license, each.url, each.split) for each, several in made]
    numbers = all(image.id.isdecimal() for image in result)
    return sorted(result, key=lambda image: (int(image.id) if numbers else 0, image.id))


def _first(captions: Sequence[str], count: int) -> tuple[str, ...]:
    """The first captions that say something; only where there are too few of them, empty ones too."""
    words = [caption for caption in captions if caption.strip()]
    return tuple([*words, *("" for _ in range(len(captions) - len(words)))][:count])


def is_karpathy(content: Mapping[str, Any]) -> bool:
    """Whether a captions file holds its captions in its images, as Karpathy's do."""
    images = content.get("images")
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def _of_splits(path: Path, entries: list[_Entry], splits: Sequence[str] | None) -> list[_Entry]:
    if splits is None:
        return entries
    known = Counter(entry.split for entry in entries)
    missing = [split for split in splits if split not in known]
    if missing:
        there = ", ".join(f"{split!r} ({count:,})" for split, count in sorted(known.items()) if split) or "none"
        raise ValueError(f"{path}: no image has the split {missing[0]!r}; its splits are {there}.")
    return [entry for entry in entries if entry.split in splits]


def _of_subset(path: Path, entries: list[_Entry], subset: Sequence[str]) -> list[_Entry]:
    check_unique(subset)
    wanted = set(subset)
    unknown = sorted(wanted - {entry.id for entry in entries})
    if unknown:
        raise ValueError(
            f"subset names {len(unknown)} ids that the captions file does not have: {shown(unknown)}; its ids look "
            f"like {entries[0].id!r}."
        )
    if not wanted:
        raise ValueError(f"subset keeps no image of {path}. Name at least one id.")
    return [entry for entry in entries if entry.id in wanted]


def _coco_entries(path: Path, content: Mapping[str, Any]) -> list[_Entry]:
    """The images of COCO's file with the captions of its annotations."""
    images = _listed(path, content, "images", {"id": (int, str), "file_name": (str,)})
    written = _listed(path, content, "annotations", {"image_id": (int, str), "caption": (str,)})
    terms = _license_names(content.get("licenses"))
    entries = [
        _Entry(
            str(image["id"]),
            image["file_name"],
            terms.get(_number(image.get("license")), "unknown"),
            str(image.get("flickr_url") or image.get("coco_url") or ""),
        )
        for image in images
    ]
    _check_images(path, entries)
    entry_of = {entry.id: entry for entry in entries}
    for annotation in written:
        entry = entry_of.get(str(annotation["image_id"]))
        if entry is None:
            raise ValueError(f"{path}: a caption is of image {annotation['image_id']}, which 'images' does not have.")
        entry.captions.append(annotation["caption"])
    return entries


def _karpathy_entries(path: Path, content: Mapping[str, Any]) -> list[_Entry]:
    """The images of Karpathy's file, which hold their captions; ids are COCO's where they are there."""
    images = _listed(path, content, "images", {"filename": (str,), "sentences": (list,), "split": (str,)})
    entries = []
    for number, image in enumerate(images):
        name = image.get("cocoid", image.get("imgid", image["filename"]))
        place = image.get("filepath", "")
        sentences = [each.get("raw") if isinstance(each, dict) else None for each in image["sentences"]]
        if isinstance(name, bool) or not isinstance(name, _Id) or not isinstance(place, str):
            raise ValueError(f"{path}: images[{number}] has no 'cocoid' or 'filepath' that can be used.")
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise ValueError(f"{path}: images[{number}] has a sentence without 'raw', its text.")
        file = f"{place.rstrip('/')}/{image['filename']}" if place else image["filename"]
        entries.append(_Entry(str(name), file, split=image["split"], captions=[str(each) for each in sentences]))
    _check_images(path, entries)
    return entries


def _listed(
    path: Path, content: Mapping[str, Any], name: str, fields: Mapping[str, tuple[type, ...]]
) -> list[dict[str, Any]]:
    entries = content.get(name)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has no list {name!r}: give COCO's captions file, such as captions_train2017.json.")
    for number, entry in enumerate(entries):
        for key, kinds in fields.items():
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, kinds) or isinstance(value, bool):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(
                    f"{path}: {name}[{number}] has no {key!r} of type {wanted} ({value!r}): it is not COCO's "
                    "captions file (captions_train2017.json; instances_… and person_keypoints_… hold no captions)."
                )
    return entries


def _check_images(path: Path, entries: Sequence[_Entry]) -> None:
    try:
        check_unique(entry.id for entry in entries)
        check_unique(entry.file_name for entry in entries)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for entry in entries:
        name, parts = entry.file_name, PurePosixPath(entry.file_name).parts
        odd = not name or name != "/".join(parts) or any(letter in name for letter in "\\\0")
        if odd or not parts or ".." in parts or parts[0] == "/" or PureWindowsPath(name).drive:
            raise ValueError(
                f"{path}: image {entry.id} has the file name {name!r}, which leads elsewhere. A file name is that of a "
                "file in the image folder or below it."
            )
        if "\0" in entry.id or entry.id.splitlines() != [entry.id]:
            raise ValueError(f"{path}: the id {entry.id!r} is empty, or holds a NUL character or a line break.")


def _number(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _license_names(licenses: Any) -> dict[int, str]:
    """Maps numbers of licences to names."""
    entries = [entry for entry in licenses if isinstance(entry, dict)] if isinstance(licenses, list) else []
    return {_number(entry.get("id")): str(entry.get("name") or entry.get("url") or "unknown") for entry in entries}
