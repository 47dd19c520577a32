"""The prompt of an image that is asked about: the one that is given, or the one that the image's own file states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL.Image import Image

from wherefrom.queries.generation_metadata import read_generation_metadata
from wherefrom.queries.types import Query


def with_prompt(query: Query, image: Path | Image, prompt: str | None) -> Query:
    """The query with its prompt: the one that is given, else the one that the image itself states, else none.

    Args:
        query: The query.
        image: The file, or what Pillow opened.
        prompt: The prompt that is given; None gives none.
    """
    metadata = read_generation_metadata(image)
    own = prompt is None and metadata is not None and metadata.prompt is not None
    chosen = (metadata.prompt if own and metadata is not None else prompt) or ""
    return replace(query, prompt=chosen, metadata=metadata, own_prompt=own)
