"""What lies in a folder of images and is none of its training images: masks, formats that are not read, links."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from wherefrom.data.layouts.base import SUFFIXES, Place, counted, shown

# What OneTrainer puts beside an image, named after it.
_MASKS = ("-masklabel", "-condlabel")
# Folder of ai-toolkit's in which it keeps control images, and trains on none.
_CONTROLS = "_controls"
# What kohya's trainers take for an image.
TRAINED = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"))
# Images that Pillow does not open without further libraries, and drawings that are no pixels.
_UNREAD = frozenset((".heic", ".heif", ".jxl", ".svg", ".psd", ".cr2", ".nef", ".arw", ".dng"))


def _is_mask(name: str) -> bool:
    return PurePosixPath(name).stem.endswith(_MASKS) or PurePosixPath(name).parent.name == _CONTROLS


def images_to_read(place: Place) -> list[str]:
    """Paths below the folder of its images, without masks."""
    return [name for name in place.images if not _is_mask(name)]


def untrained(names: Iterable[str]) -> list[str]:
    """A line about images of formats that kohya's trainers do not look at, or that are not read here."""
    odd = [name for name in sorted(names) if PurePosixPath(name).suffix.lower() in (SUFFIXES | _UNREAD) - TRAINED]
    return [f"left out for formats that kohya's trainer or this does not read: {shown(odd)}"] if odd else []


def left_out(place: Place) -> list[str]:
    """Lines about what is not read as an image, where there is any."""
    masks = [name for name in place.images if _is_mask(name)]
    unread = [name for name in place.files if PurePosixPath(name).suffix.lower() in _UNREAD]
    lines = []
    if masks:
        lines.append(f"left out as masks or control images, {counted(len(masks), 'image')}: {shown(masks)}")
    if unread:
        lines.append(f"left out for formats that are not read, {counted(len(unread), 'image')}: {shown(unread)}")
    if place.linked_folders:
        lines.append(f"linked folders are not followed: {shown(place.linked_folders)}")
    return lines
