"""Images of a set with exactly the pixels of another image."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from wherefrom.data.image_set import ImageSet

_SAMPLED = 4  # rows and columns of pixels that are looked at first: most of a large set is then never read


def identical_images(images: ImageSet, others: Iterable[Any]) -> list[tuple[int, int]]:
    """The pairs (position in `images`, position in `others`) whose pixels are exactly the same.

    Args:
        images: The set; it may be memory-mapped and large.
        others: Images (H, W, 3); few, or memory-mapped too.
    """
    found: dict[bytes, list[tuple[int, Any]]] = {}
    for place, pixels in enumerate(others):
        found.setdefault(_sample(pixels), []).append((place, pixels))
    pairs = []
    for position in range(len(images)) if found else ():
        pixels = images.pixels[position]
        for place, other in found.get(_sample(pixels), ()):
            if np.array_equal(pixels, other):
                pairs.append((position, place))
    return pairs


def _sample(pixels: Any) -> bytes:
    """The shape and some pixels."""
    height, width = (int(side) for side in pixels.shape[:2])
    some = pixels[:: max(1, height // _SAMPLED), :: max(1, width // _SAMPLED)]
    return repr(tuple(pixels.shape)).encode() + np.ascontiguousarray(some).tobytes()
