"""Text files of captions beside images, as several trainers read them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from wherefrom.data.layouts.base import CaptionLines, ReadingOptions, inside

SUFFIXES_OF_CAPTIONS = (".txt", ".caption")
_LARGEST = 2**20
_TRIGGER = "[trigger]"


def caption_text(folder: Path, name: str) -> str:
    """The text of a caption file.

    Args:
        folder: The folder.
        name: The file's path below it.

    Raises:
        ValueError: It leads out of the folder, is no UTF-8, or is too large for a caption.
    """
    path = folder / name
    if not inside(folder, path):
        raise ValueError(f"{path} is a link that leads out of {folder}. Put the file itself there.")
    size = path.stat().st_size
    if size > _LARGEST:
        raise ValueError(f"{path} has {size:,} bytes, which is no caption. Take it out of the folder.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    if "\0" in text:
        raise ValueError(f"{path} holds a NUL character. Save it as UTF-8 text.")
    return text


def captions_of_text(text: str, lines: CaptionLines) -> tuple[str, ...]:
    """The captions that a text means; the empty one where it has no words."""
    written = [line.strip() for line in text.splitlines() if line.strip()]
    if lines == "first":
        return (text.splitlines()[0].strip() if text.splitlines() else "",)
    return ((" ".join(written),) if lines == "whole" else tuple(written)) or ("",)


def caption_file(image: str, files: frozenset[str], options: ReadingOptions) -> list[str]:
    """The caption files beside an image that there are.

    Args:
        image: The image's path below the folder.
        files: Those of all files.
        options: Name the suffix, or leave it to be found.
    """
    suffixes = SUFFIXES_OF_CAPTIONS if options.caption is None else (_suffix(options.caption),)
    beside = [PurePosixPath(image).with_suffix(suffix).as_posix() for suffix in suffixes]
    return [name for name in beside if name in files]


def _suffix(caption: str) -> str:
    if not caption.startswith(".") or len(caption) < 2 or "/" in caption or "\0" in caption:
        raise ValueError(
            f"caption: {caption!r} is no suffix of caption files. Give one such as '.txt', or leave the option "
            "'caption' out; column names are for folders with metadata."
        )
    return caption


def captions_beside(
    folder: Path, image: str, files: frozenset[str], options: ReadingOptions, lines: CaptionLines = "each"
) -> tuple[str, ...] | None:
    """The captions in the file beside an image; None where there is none.

    Args:
        folder: The folder.
        image: The image's path below it.
        files: Those of all files.
        options: Suffix, what lines are, and the trigger.
        lines: What lines are where the options do not say.

    Raises:
        ValueError: There are two files of different captions, or one cannot be used.
    """
    names = caption_file(image, files, options)
    found = {name: captions_of_text(caption_text(folder, name), options.caption_lines or lines) for name in names}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{folder / image} has caption files that differ: {', '.join(found)}. Keep one of them, or name the suffix "
            "in the option 'caption'."
        )
    return next(iter(found.values()), None)


def with_trigger(captions: tuple[str, ...], where: str, trigger: str | None) -> tuple[str, ...]:
    """Captions with ai-toolkit's placeholder replaced.

    Raises:
        ValueError: A caption has the placeholder, and nothing says what it stands for.
    """
    if trigger is None and any(_TRIGGER in caption for caption in captions):
        raise ValueError(
            f"{where}: the caption holds {_TRIGGER!r}, which stands for the trigger word of the training. Give it in "
            "the option 'trigger' ('' takes the placeholder out)."
        )
    return tuple(caption.replace(_TRIGGER, trigger or "") for caption in captions)
