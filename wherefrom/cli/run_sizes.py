"""How flags and files say sizes of images and aspect buckets."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wherefrom.data.framing import AnySize, Framing
    from wherefrom.queries.run_size import RunSize

SIZES = "image_sizes.json"
_SIZE = re.compile(r"(\d{1,6})(?:[x×](\d{1,6}))?")
_NUMBERS = ("resolution", "min_side", "max_side", "step")


def size_text(value: Any, where: str) -> str:
    """A size as a request holds it.

    Args:
        value: A number of pixels, or a text.
        where: What gives it, for errors.

    Raises:
        ValueError: It is neither a number of pixels nor WIDTHxHEIGHT.
    """
    text = str(value).replace(" ", "").lower()
    if isinstance(value, bool) or (text and not _SIZE.fullmatch(text)):
        raise ValueError(f"{where} is a number of pixels, or WIDTHxHEIGHT such as 768x512; given {value!r}.")
    return text


def size_of(text: str) -> AnySize | None:
    """The size that a request asks for: the side of a square, (height, width), or None."""
    found = _SIZE.fullmatch(text)
    if found is None:
        return None
    width, height = found.groups()
    return int(width) if height is None else (int(height), int(width))


def bucket_numbers(value: Any, where: str) -> dict[str, Any] | None:
    """Aspect buckets as a request holds them.

    Args:
        value: True, False, None, a mapping, or `key=value` words with commas between.
        where: What gives them, for errors.

    Raises:
        ValueError: A key or a value is not one of buckets.
    """
    if value is None or value is False:
        return None
    if isinstance(value, str):
        pairs = [word.partition("=") for word in value.split(",") if word.strip()]
        value = {key.strip(): text.strip() for key, _, text in pairs}
    made: dict[str, Any] = {}
    given: Mapping[str, Any] = {} if value is True else value if isinstance(value, Mapping) else {"": value}
    for key, each in given.items():
        text = str(each).lower()
        if key == "upscale" and text in ("true", "false"):
            made[key] = text == "true"
        elif key in _NUMBERS and text.isdigit():
            made[key] = int(text)
        else:
            said = f"{key}={each}" if key else repr(each)
            raise ValueError(
                f"{where} takes {', '.join(_NUMBERS)} (pixels) and upscale (true or false), as "
                f"min_side=256,upscale=false; given {said}."
            )
    return made


def add_size_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of sizes, and of images that cannot be read."""
    add = parser.add_argument
    add("--size", metavar="PIXELS", help="size of all images, as 768 or 768x512 (default: the model's own)")
    add("--fit", choices=("crop", "pad", "stretch"), help="how images are brought to it (default: crop)")
    add("--pad-color", metavar="COLOR", help="of the margins of --fit pad (default: white)")
    add(
        "--buckets",
        nargs="?",
        const="",
        metavar="KEY=N,...",
        help="aspect buckets as kohya's: resolution, min_side, max_side, step, upscale=false",
    )
    add("--exif", choices=("apply", "ignore"), help="turn photographs upright, or not (default: apply)")
    add("--alpha", choices=("white", "drop"), help="put transparent images on white, or drop it (default: white)")
    add("--on-error", choices=("stop", "skip"), help="training images that cannot be read (default: stop)")


def keep_size(run: Path, size: RunSize | None) -> None:
    """Leaves the buckets' numbers in a run folder: they depend on the model, which a page does not load again.

    Args:
        run: The run folder.
        size: The run's size; without buckets the request says it all.
    """
    if size is not None and size.framing.buckets is not None:
        from wherefrom.runtime.artifacts import write_json

        write_json(run / SIZES, {"size": size.option, "buckets": asdict(size.framing.buckets)})


def kept_size(run: Path, request: Any) -> tuple[AnySize, Framing] | None:
    """What `keep_size` left; None where there is nothing.

    Args:
        run: The run folder.
        request: Its `Request`.
    """
    if not (run / SIZES).is_file():
        return None
    from wherefrom.data.aspect_buckets import Buckets

    kept = json.loads((run / SIZES).read_text())
    size = kept["size"]
    framing = replace(framing_of(request), buckets=Buckets(**kept["buckets"]))
    return size if isinstance(size, int) else (int(size[0]), int(size[1])), framing


def framing_of(request: Any) -> Framing:
    """How a request's images are brought to their size.

    Args:
        request: The `Request`.

    Raises:
        ValueError: A value cannot be used.
    """
    from wherefrom.data.aspect_buckets import Buckets
    from wherefrom.data.framing import Framing

    buckets = None if request.buckets is None else Buckets(**request.buckets)
    return Framing(request.fit, request.pad_color, request.exif, request.alpha, buckets)
