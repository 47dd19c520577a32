"""wherefrom: which training images did this image come from?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wherefrom.api import attribute_images
    from wherefrom.attributors import AttributionByUnlearning, Scores
    from wherefrom.models.pipeline import load_pipeline

__all__ = ["AttributionByUnlearning", "Scores", "attribute_images", "load_pipeline"]

_HOMES = {
    "AttributionByUnlearning": "wherefrom.attributors",
    "Scores": "wherefrom.attributors",
    "attribute_images": "wherefrom.api",
    "load_pipeline": "wherefrom.models.pipeline",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: diffusers and transformers take seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module 'wherefrom' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
