"""Models that were distilled to draw in few steps: they were not trained by the loss that attribution measures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from diffusers import LCMScheduler, TCDScheduler

# Schedulers of no other models than distilled ones.
_SCHEDULERS = (LCMScheduler, TCDScheduler)
_WORDS = re.compile(
    r"(?<![a-z])(?:turbo|lightning|hyper[-_ ]?sd(?:xl)?|lcm|tcd|dmd2?|pcm|sdxs|flash[-_ ]?sd(?:xl|3)?|distill(?:ed)?)"
    r"(?![a-z])|(?<![\da-z])(?:1|2|4|8|16)[-_ ]?steps?(?![a-z])",
    re.IGNORECASE,
)
_SAID = "The model seems to be distilled to draw in few steps"
_PARTS = re.compile(r"unet|transformer|diffusion_pytorch_model.*|[0-9a-f]{40}|snapshots|")


def distilled_by_name(place: str) -> str | None:
    """The part of a model's place that says that it was distilled; None where none does.

    Args:
        place: A path, a hub id, or the name of an adapter. Of a path only the last folder or file counts that is
            called by a person, and not those above it.
    """
    for name in reversed(PurePosixPath(place.replace("\\", "/")).parts):
        if not _PARTS.fullmatch(name):
            return name if _WORDS.search(name) else None
    return None


def is_noted(notes: Iterable[str]) -> bool:
    """Whether the warning is among these."""
    return any(note.startswith(_SAID) for note in notes)


def distilled_notes(places: Iterable[str], scheduler: Any = None) -> list[str]:
    """A warning for pages and consoles where a model was distilled to draw in few steps.

    Args:
        places: Where model and adapters come from, or what they are called.
        scheduler: The pipeline's.
    """
    signs = [f"{name!r} is called so" for name in dict.fromkeys(map(distilled_by_name, places)) if name]
    if isinstance(scheduler, _SCHEDULERS):
        signs.append(f"its scheduler is a {type(scheduler).__name__}")
    if not signs:
        return []
    return [
        f"{_SAID} ({'; '.join(signs)}): it was not trained by the loss that "
        "is measured. For what it learned from its images, attribute the model that it was distilled from."
    ]
