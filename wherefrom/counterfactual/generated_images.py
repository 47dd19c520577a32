"""Images that retrained models draw: one PNG a model, the queries' images side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from wherefrom.runtime.artifacts import replacing

_FOLDER, _FOLDER_BEFORE = "images", "pictures"


def images_folder(run: Path) -> Path:
    """The folder of a run with what each model draws, by the name that an earlier release gave it if it is there."""
    before = run / _FOLDER_BEFORE
    return before if before.exists() else run / _FOLDER


def write_strip(path: Path, drawn: Mapping[str, UInt8[NDArray[np.uint8], "h w 3"]]) -> None:
    """Writes the images that a model draws side by side, in the order of their ids.

    Raises:
        StorageError: The file could not be written.
    """
    with replacing(path) as temporary:
        Image.fromarray(np.concatenate([drawn[query] for query in sorted(drawn)], axis=1)).save(temporary, "PNG")


def read_strip(path: Path, queries: Sequence[str]) -> dict[str, UInt8[NDArray[np.uint8], "h w 3"]]:
    """Query -> the image that a model draws for it.

    Args:
        path: A file of `write_strip`.
        queries: All queries of the panel.

    Raises:
        ValueError: The file is no image of so many queries.
    """
    try:
        with Image.open(path) as opened:
            strip = np.asarray(opened.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
    if strip.shape[1] % len(queries):
        raise ValueError(f"{path} is {strip.shape[1]} pixels wide, which is no multiple of its {len(queries)} queries.")
    return dict(zip(sorted(queries), np.split(strip, len(queries), axis=1), strict=True))
