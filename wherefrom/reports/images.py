"""Images and text from outside, as they stand in reports."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image

from wherefrom.reports.html import Markup, shorten, tag

Pixels = UInt8[NDArray[np.uint8], "h w 3"]
LABEL = 100  # longest label shown, in characters
_THUMBNAIL = 64  # side in CSS pixels


def foreign(text: str, most: int = LABEL) -> Markup:
    """Text from outside, isolated, so that its direction does not spill into what stands beside it."""
    return tag("bdi", shorten(text, most))


def _encode(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def png_data_uri(pixels: Pixels) -> str:
    """The image as a `data:` address of a PNG, every pixel kept.

    Raises:
        ValueError: The pixels are not uint8 RGB of shape (H, W, 3).
    """
    check_pixels("the image", pixels)
    return _encode(Image.fromarray(np.ascontiguousarray(pixels)))


def image_tag(pixels: Pixels, side: int, alt: str) -> Markup:
    """The image in a box of that side: small ones enlarged by a whole factor, large ones reduced to twice the side.

    Twice, because a sharp screen has two pixels or more for each CSS pixel.
    """
    height, width = pixels.shape[:2]
    longest = max(height, width)
    if longest <= side:
        factor = side // longest
        return tag(
            "img", src=png_data_uri(pixels), width=width * factor, height=height * factor, alt=alt, class_="pixels"
        )
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((2 * side, 2 * side), Image.Resampling.LANCZOS)
    shown = [max(1, round(length * side / longest)) for length in (width, height)]
    return tag("img", src=_encode(image), width=shown[0], height=shown[1], alt=alt)


def check_pixels(name: str, pixels: Pixels) -> None:
    """Refuses what is no image.

    Raises:
        ValueError: The pixels are not uint8 RGB of shape (H, W, 3).
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"The pixels of {name} are {pixels.dtype} {pixels.shape}; the report needs uint8 RGB, (H, W, 3)."
        )


def thumbnail_row(label: Markup, images: Iterable[tuple[Pixels, str]]) -> Markup:
    """A row of small images, each with the words that are shown when it is pointed at."""
    items = [tag("li", image_tag(pixels, _THUMBNAIL, words), title=words) for pixels, words in images]
    return tag("div", label, tag("ol", *items), class_="row")
