"""What a page says of the training images beside their number."""

from __future__ import annotations

from collections.abc import Mapping

from wherefrom.data.image_set import ImageSet
from wherefrom.models.image_sizes import words_of

_SHOWN = 3


def image_facts(images: ImageSet) -> Mapping[str, str]:
    """Facts that are worth a line: images that could not be read, and several sizes; none where all is as usual."""
    facts = {}
    if images.skipped:
        shown = ", ".join(images.skipped[:_SHOWN]) + (", …" if len(images.skipped) > _SHOWN else "")
        facts["Images left out, which could not be read"] = f"{len(images.skipped):,}: {shown}"
    sizes = images.distinct_sizes
    if len(sizes) > 1:
        facts["Sizes of the images"] = f"{len(sizes)}, from {words_of(sizes[0])} to {words_of(sizes[-1])} pixels"
    return facts
