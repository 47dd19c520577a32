"""wherefrom: which training images did this image come from?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wherefrom.api import AttributionOptions, attribute_images, compare
    from wherefrom.attributors import (
        TRAK,
        AttributionByUnlearning,
        Attributor,
        InfluenceBank,
        InfluenceFunction,
        JourneyTRAK,
        LearnedRanker,
        Query,
        Rerank,
        Scores,
        TrainingData,
    )
    from wherefrom.counterfactual.datamodeling_experiment import linear_datamodeling_score
    from wherefrom.counterfactual.evaluate import evaluate_counterfactual
    from wherefrom.index import Index
    from wherefrom.models.pipeline import load_pipeline

    __version__: str

__all__ = [
    "TRAK",
    "AttributionByUnlearning",
    "AttributionOptions",
    "Attributor",
    "Index",
    "InfluenceBank",
    "InfluenceFunction",
    "JourneyTRAK",
    "LearnedRanker",
    "Query",
    "Rerank",
    "Scores",
    "TrainingData",
    "__version__",
    "attribute_images",
    "compare",
    "evaluate_counterfactual",
    "linear_datamodeling_score",
    "load_pipeline",
]

# Where each public name is defined; a module's name alone says that it is called there as here.
_HOMES = {
    **dict.fromkeys(
        (
            "TRAK",
            "AttributionByUnlearning",
            "Attributor",
            "InfluenceBank",
            "InfluenceFunction",
            "JourneyTRAK",
            "LearnedRanker",
            "Query",
            "Rerank",
            "Scores",
            "TrainingData",
        ),
        "wherefrom.attributors",
    ),
    **dict.fromkeys(("AttributionOptions", "attribute_images", "attribute_pictures", "compare"), "wherefrom.api"),
    "Index": "wherefrom.index",
    "evaluate_counterfactual": "wherefrom.counterfactual.evaluate",
    "linear_datamodeling_score": "wherefrom.counterfactual.datamodeling_experiment",
    "load_pipeline": "wherefrom.models.pipeline",
}


def _version() -> str:
    """The installed version; a source tree that was never installed has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("wherefrom")
    except PackageNotFoundError:
        return "0+source"


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: diffusers and transformers take seconds to import."""
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'wherefrom' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
