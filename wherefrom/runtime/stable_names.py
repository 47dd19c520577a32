"""Stable names of classes: what an identity calls a class, wherever the class lives.

An identity (`artifacts`) is hashed, so it must never hold an import path: moving a file would orphan all that was made
before. Classes that occur in identities have one row here. The stable name of a class is the path at which it stood
when the first identity that names it was stored; a new class takes any name that no other has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Stable name -> where the class is now.
CLASSES: Mapping[str, str] = {
    "wherefrom.muon.MuonAdamW": "wherefrom.training.muon.MuonAdamW",
    "wherefrom.schedules.WarmupStableDecay": "wherefrom.training.lr_schedules.WarmupStableDecay",
    "wherefrom.parts.unet_from_config": "wherefrom.models.factories.unet_from_config",
    "wherefrom.parts.transformer_from_config": "wherefrom.models.factories.transformer_from_config",
    "wherefrom.parts.autoencoder_from_config": "wherefrom.models.factories.autoencoder_from_config",
    "wherefrom.parts.LatentEncoder": "wherefrom.models.encoders.LatentEncoder",
    "wherefrom.pipeline.encoder_of_pipeline": "wherefrom.models.pipeline.encoder_of_pipeline",
    "wherefrom.prompts.masked_captions": "wherefrom.models.prompt_encoders.masked_captions",
    "wherefrom.features.EfficientNetLite0Encoder": "wherefrom.features.base.EfficientNetLite0Encoder",
    "wherefrom.features.MiniLMEncoder": "wherefrom.features.base.MiniLMEncoder",
    "wherefrom.features.MiniLMEncoder.from_pretrained": "wherefrom.features.base.MiniLMEncoder.from_pretrained",
    "wherefrom.encoders.MappedEncoder": "wherefrom.features.pretrained.MappedEncoder",
    "wherefrom.encoders.OpenCLIPImageEncoder": "wherefrom.features.pretrained.OpenCLIPImageEncoder",
    "wherefrom.encoders.OpenCLIPTextEncoder": "wherefrom.features.pretrained.OpenCLIPTextEncoder",
    "wherefrom.encoders.TransformersImageEncoder": "wherefrom.features.pretrained.TransformersImageEncoder",
    "wherefrom.ranker.Ranker": "wherefrom.distillation.ranker.Ranker",
    "wherefrom.ranking_losses.BinaryCrossEntropy": "wherefrom.distillation.losses.BinaryCrossEntropy",
}
_STABLE = {path: name for name, path in CLASSES.items()}


def stable(value: Any) -> Any:
    """A configuration whose classes are called by their stable names.

    Args:
        value: What YAML holds: dictionaries, lists, strings, numbers. Only the values of `class_path` are read as
            names; a class outside the table keeps its path.
    """
    if isinstance(value, Mapping):
        return {
            key: _STABLE.get(each, each) if key == "class_path" and isinstance(each, str) else stable(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [stable(each) for each in value]
    return value


def current(path: str) -> str:
    """Where the class with this stable name is now; any other path is returned as it is."""
    return CLASSES.get(path, path)
