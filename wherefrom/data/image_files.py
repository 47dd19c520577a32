"""Image files as RGB pixels: which formats are opened, and what can go wrong with a damaged one."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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


def reason_of(error: BaseException) -> str:
    """Why an image cannot be read, in one line; without a stream's address, which differs from run to run."""
    said = " ".join(str(error).split())
    return type(error).__name__ if not said or "BytesIO" in said else said


def unreadable_headers(images: Sequence[tuple[str, Path]], workers: int = 1) -> dict[str, str]:
    """Images that cannot be read by their headers: name -> reason.

    Args:
        images: The name of each, and its file.
        workers: Threads.
    """

    def reason(image: tuple[str, Path]) -> str | None:
        try:
            read_header(image[1])
        except (*UNREADABLE, Image.DecompressionBombWarning) as error:
            return reason_of(error)
        return None

    # Pillow only warns of images between its limit and twice that; where parts are decoded, they count as too large.
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if workers > 1:
            with ThreadPoolExecutor(workers) as pool:
                found = list(pool.map(reason, images))
        else:
            found = [reason(image) for image in images]
    return {name: why for (name, _), why in zip(images, found, strict=True) if why is not None}
