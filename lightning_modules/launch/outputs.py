"""What a command hands to W&B logging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wherefrom.attributors import Scores
from wherefrom.data.image_set import ImageSet
from wherefrom.runtime.artifacts import Store


@dataclass(frozen=True)
class Outputs:
    """Outputs of a command for W&B logging.

    Attributes:
        store: Artifacts that it found or made.
        results: Scores of its queries.
        images: The training images.
        is_main: Whether this process logs.
    """

    store: Store | None = None
    results: Sequence[Scores] = ()
    images: ImageSet | None = None
    is_main: bool = True
