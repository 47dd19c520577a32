"""Text files of captions beside images, as several trainers read them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from wherefrom.data.layouts.base import CaptionLines, ReadingOptions, inside

SUFFIXES_OF_CAPTIONS = (".txt", ".caption")
_LARGEST = 2**20
_TRIGGERS = ("[trigger]", "[name]")


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


def lines_of(text: str) -> list[str]:
    """The lines of a text as trainers count them: at line feeds, and at no other separator of Unicode's."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def captions_of_text(text: str, lines: CaptionLines) -> tuple[str, ...]:
    """The captions that a text means; the empty one where it has no words."""
    if lines == "whole":
        return ("\n".join(lines_of(text)).strip(),)
    if lines == "first":
        return (lines_of(text)[0].strip(),)
    return tuple(line.strip() for line in lines_of(text) if line.strip()) or ("",)


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


def text_beside(folder: Path, image: str, files: frozenset[str], options: ReadingOptions) -> str | None:
    """The text of the file beside an image; None where there is none.

    Args:
        folder: The folder.
        image: The image's path below it.
        files: Those of all files.
        options: The suffix.

    Raises:
        ValueError: There are two files of different texts, or one cannot be used.
    """
    found = {name: caption_text(folder, name) for name in caption_file(image, files, options)}
    if len({captions_of_text(text, "each") for text in found.values()}) > 1:
        raise ValueError(
            f"{folder / image} has caption files that differ: {', '.join(found)}. Keep one of them, or name the suffix "
            "in the option 'caption'."
        )
    return next(iter(found.values()), None)


def with_trigger(captions: tuple[str, ...], where: str, trigger: str | None, before: bool = False) -> tuple[str, ...]:
    """Captions with ai-toolkit's placeholders replaced.

    Args:
        captions: The captions.
        where: Where they stand, for errors.
        trigger: What the placeholders stand for.
        before: As ai-toolkit does, put it before captions that do not hold it.

    Raises:
        ValueError: A caption has a placeholder, and nothing says what it stands for.
    """
    if trigger is None:
        for caption in captions:
            there = [placeholder for placeholder in _TRIGGERS if placeholder in caption]
            if there:
                raise ValueError(
                    f"{where}: the caption holds {there[0]!r}, which stands for the trigger word of the training. Give "
                    "it in the option 'trigger' ('' takes the placeholder out)."
                )
        return captions
    made = []
    for caption in captions:
        for placeholder in _TRIGGERS:
            caption = caption.replace(placeholder, trigger)
        made.append(f"{trigger} {caption}" if before and trigger.strip() and trigger not in caption else caption)
    return tuple(made)
