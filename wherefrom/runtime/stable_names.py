"""Stable names: what an identity calls a class or a setting, wherever it lives and whatever it is called today.

An identity (`artifacts`) is hashed, so it must never hold an import path: moving a file would orphan all that was made
before. Classes that occur in identities have one row here. The stable name of a class is the path at which it stood
when the first identity that names it was stored; a new class takes any name that no other has. Settings that were
renamed have a row too, for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, field, fields, is_dataclass
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
    "wherefrom.prompts.masked_captions": "wherefrom.models.families.pixart.masked_captions",
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
# Settings that were renamed: name in identities -> name now. An identity holds the first name for ever.
SETTINGS: Mapping[str, str] = {
    "draws": "noise_samples",
    "measure_draws": "measurement_samples",
    "rise": "relative_loss_increase",
    "visits": "samples_per_image",
}
# Classes that identities call by their bare names: the first name -> the name now.
BARE_NAMES: Mapping[str, str] = {"LossDraws": "LossSamples"}
_STABLE = {path: name for name, path in CLASSES.items()}
_STABLE_SETTING = {name: first for first, name in SETTINGS.items()}
_STABLE_BARE = {name: first for first, name in BARE_NAMES.items()}


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


_ADDED = "added"


def added_setting(default: Any) -> Any:
    """A field of a settings data class that came after its identities: it enters one only where it was changed.

    What was stored before the setting existed is therefore found again, as long as the default does what was done then.

    Args:
        default: The field's default, which must not be mutable.
    """
    return field(default=default, metadata={_ADDED: True})


def _enters(each: Field[Any], settings: Any) -> bool:
    return not (each.metadata.get(_ADDED) and getattr(settings, each.name) == each.default)


def settings_identity(settings: Any) -> dict[str, Any]:
    """The fields of a settings data class by their stable names, nested ones included, for an identity.

    Args:
        settings: An instance of a data class.
    """

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return settings_identity(value)
        if isinstance(value, list | tuple):
            return type(value)(plain(each) for each in value)
        return value

    return {
        _STABLE_SETTING.get(each.name, each.name): plain(getattr(settings, each.name))
        for each in fields(settings)
        if _enters(each, settings)
    }


def bare_name(kind: type) -> str:
    """What identities call a class that they name without its module."""
    return _STABLE_BARE.get(kind.__name__, kind.__name__)
