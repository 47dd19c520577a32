"""Image files as RGB pixels: which formats are opened, and what can go wrong with a damaged one."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image

from wherefrom.data.framing import AnySize, Framing
from wherefrom.models.image_sizes import Size

# Pillow would also open formats that run external programs (EPS), and some that are not images.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
# Pillow raises many unrelated types on damaged files.
UNREADABLE = (
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def _open(source: Path | BinaryIO) -> Image.Image:
    Image.init()
    return Image.open(source, formats=[name for name in _FORMATS if name in Image.OPEN])


def _check_mode(mode: str) -> None:
    if mode in ("I", "F"):
        raise ValueError(
            f"pixels of Pillow's mode {mode!r} have no defined white level; save it with 8 or 16 bits per channel"
        )


def load_image(
    source: Path | BinaryIO, size: AnySize | None, framing: Framing = Framing()
) -> UInt8[NDArray[np.uint8], "h w 3"]:
    """Loads an image as RGB: upright, on white and, given a size, cropped to its largest centred square and resized.

    Args:
        source: The file, or its open stream.
        size: Side of the square, or (height, width); None keeps the image's own.
        framing: What else may be done than is said above.

    Raises:
        ValueError: The pixel mode has no defined white level, or the image is too small for a bucket.
    """
    with _open(source) as opened:
        image = framing.upright(opened)
    if image.mode.startswith("I;16"):  # Pillow's own conversion to 8 bits clips instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    _check_mode(image.mode)
    return np.asarray(framing.fitted(framing.opaque(image), size))


def read_header(source: Path | BinaryIO) -> Size:
    """(height, width) as stored, from the header alone; nothing is decoded.

    What a header shows is found in this way before anything long: a format that is not opened, a file that is empty or
    cut short within its header, a size above Pillow's limit, pixels without a white level.

    Raises:
        ValueError: See `load_image`; and whatever else of `UNREADABLE`.
    """
    with _open(source) as opened:
        _check_mode(opened.mode)
        return opened.height, opened.width
