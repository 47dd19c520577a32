"""Settings of the released models whose fine-tunings are shared as single files, which hold weights and no settings.

Each is a JSON file beside this one: the parts with their classes and configurations, the scheduler, and what fills
captions up. The sources are the models' own inference files (CompVis/stable-diffusion, Stability-AI/generative-models).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import diffusers
import transformers
from torch import nn

RELEASED = ("sd1", "sd2", "sdxl", "sd3_medium", "sd3.5_medium", "sd3.5_large")


@dataclass(frozen=True)
class Blueprint:
    """What a part is made from before it has weights.

    Attributes:
        kind: The class, of diffusers or transformers.
        config: Its configuration.
    """

    kind: Any
    config: Any

    @classmethod
    def of(cls, part: nn.Module) -> Blueprint:
        """Of a part that is there."""
        return cls(type(part), part.config)

    def build(self) -> Any:
        """The part with random weights."""
        if hasattr(self.kind, "from_config"):
            return self.kind.from_config(self.config)
        config = self.config
        return self.kind(self.kind.config_class(**config) if isinstance(config, dict) else config)


@dataclass(frozen=True)
class ReleasedModel:
    """A released model.

    Attributes:
        name: What it is called.
        pipeline: The pipeline's class.
        parts: Name -> what it is made from.
        scheduler: The scheduler's class and settings.
        pads: Tokenizer's name -> what fills captions up.
        prediction: What the network predicts; None where the released models differ.
    """

    name: str
    pipeline: Any
    parts: Mapping[str, Blueprint]
    scheduler: Blueprint
    pads: Mapping[str, str]
    prediction: str | None


def released_model(settings: Mapping[str, Any]) -> ReleasedModel:
    """A released model from its settings, as the JSON files have them."""
    parts = {name: _blueprint(part) for name, part in settings["parts"].items()}
    return ReleasedModel(
        settings["name"],
        getattr(diffusers, settings["pipeline"]),
        parts,
        _blueprint(settings["scheduler"]),
        settings["pads"],
        settings["prediction"],
    )


def _blueprint(part: Mapping[str, Any]) -> Blueprint:
    """The classes are named by our own files only."""
    kind = getattr(diffusers, part["class"], None) or getattr(transformers, part["class"])
    return Blueprint(kind, part["config"])


@cache
def released_models() -> Mapping[str, ReleasedModel]:
    """All of them by their short names."""
    folder = files("wherefrom.models").joinpath("released")
    return {name: released_model(json.loads(folder.joinpath(f"{name}.json").read_text())) for name in RELEASED}
