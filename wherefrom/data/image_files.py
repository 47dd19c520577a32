"""Image files as RGB pixels: which formats are opened, and what can go wrong with a damaged one."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps

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


def load_image(path: Path | BinaryIO, size: int | None) -> UInt8[NDArray[np.uint8], "h w 3"]:
    """Loads an image as RGB: upright, on white and, given a size, cropped to its largest centred square and resized.

    Raises:
        ValueError: The pixel mode has no defined white level.
    """
    Image.init()
    with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):  # Pillow's own conversion to 8 bits clips instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels of Pillow's mode {image.mode!r} have no defined white level; save it with 8 or 16 bits per channel"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)
