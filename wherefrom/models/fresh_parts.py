"""A part beside a fresh one of the same configuration: what was switched on, exchanged or added since is refused.

The fresh part holds no numbers (it is made on torch's `meta` device), only which layers there are and how each is set.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import nn
from transformers import PreTrainedModel

from wherefrom.models.attention_processors import check_processor

_PLAIN = (bool, int, float, str, FunctionType, BuiltinFunctionType)
# Attributes that decide nothing that is computed, or that weights' shapes show.
_FREE = frozenset(
    {
        "training",
        "gradient_checkpointing",
        "num_embeddings",
        "vocab_size",
        "name_or_path",
        "use_slicing",
        "use_tiling",
        "lora_scale",  # what fuse_lora was asked for
    }
)
_FREEU = frozenset({"s1", "s2", "b1", "b2"})
_KEPT = 16  # fresh parts that are remembered


@dataclass(frozen=True)
class FreshLayer:
    """How one layer of a fresh part is: its class, its plain attributes, its layers, its attention processor."""

    kind: type
    settings: Mapping[str, Any]
    layers: frozenset[str]
    processor: object


_known: dict[tuple[type, str], dict[str, FreshLayer]] = {}


def _settings(module: nn.Module) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return tuple(plain(each) for each in value) if isinstance(value, list | tuple) else value

    def is_plain(value: Any) -> bool:
        return all(map(is_plain, value)) if isinstance(value, tuple) else value is None or isinstance(value, _PLAIN)

    def is_method(name: str, value: Any) -> bool:  # in its class's place: the concern of who looks at the code
        return callable(value) and hasattr(type(module), name)

    given = {name: plain(value) for name, value in vars(module).items() if not name.startswith(("_", "tile_"))}
    return {
        name: value
        for name, value in given.items()
        if name not in _FREE and is_plain(value) and not is_method(name, value)
    }


def _layers_of(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if child is not None}


def made_fresh(part: nn.Module) -> nn.Module | None:
    """A fresh part without numbers; None where the class does not make itself from a configuration."""
    config: Any = getattr(part, "config", None)
    kind: Any = type(part)
    with torch.device("meta"):
        if isinstance(part, PreTrainedModel):
            result: nn.Module = kind(copy.deepcopy(config))
            return result
        if isinstance(part, ConfigMixin):
            names = inspect.signature(kind.__init__).parameters
            made: nn.Module = kind(**{name: value for name, value in dict(config).items() if name in names})
            return made
    return None


def fresh_layers(part: nn.Module) -> Mapping[str, FreshLayer] | None:
    """Each layer of a fresh part of the same class and configuration, by name; None where none can be made."""
    config: Any = getattr(part, "config", None)
    if not isinstance(part, PreTrainedModel | ConfigMixin):
        return None
    said = config.to_json_string(use_diff=False) if isinstance(part, PreTrainedModel) else repr(sorted(config.items()))
    key = (type(part), said)
    if key not in _known:
        made = made_fresh(part)
        assert made is not None
        while len(_known) >= _KEPT:
            _known.pop(next(iter(_known)))
        _known[key] = {
            name: FreshLayer(
                type(module),
                _settings(module),
                frozenset(_layers_of(module)) - {"processor"},
                getattr(module, "processor", None),
            )
            for name, module in made.named_modules(remove_duplicate=False)
        }
    return _known[key]


def _without_adapters(module: nn.Module) -> nn.Module:
    """The layer that peft's wrap, or the module itself; adapters are the concern of who loads them."""
    while type(module).__module__.startswith("peft."):
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    return module


def _pairs(part: nn.Module, fresh: Mapping[str, FreshLayer], name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Layers by the names that a fresh part has for them."""
    module = _without_adapters(part)
    yield name, module
    for child_name, child in _layers_of(module).items():
        if child_name != "processor":
            yield from _pairs(child, fresh, f"{name}.{child_name}" if name else child_name)


def check_against_fresh(part: nn.Module, what: str) -> None:
    """Refuses a part whose layers or their settings are not those of its configuration.

    Args:
        part: Network, autoencoder or text encoder.
        what: Names it in messages.

    Raises:
        ValueError: FreeU is on; or a layer, a setting or an attention processor was exchanged; the message names it.
    """
    fresh = fresh_layers(part)
    if fresh is None:
        return
    for name, module in _pairs(part, fresh):
        where = f"{what}{f' ({name})' if name else ''}"
        usual = fresh.get(name)
        if usual is None:
            raise ValueError(
                f"{where} is a layer, {type(module).__name__}, that its configuration does not make: something added "
                "it. Take it away again, or load the pipeline anew."
            )
        _check_layer(module, usual, where)


def _check_layer(module: nn.Module, usual: FreshLayer, where: str) -> None:
    if type(module) is not usual.kind:
        raise ValueError(
            f"{where} is a {type(module).__name__} of {type(module).__module__} where its configuration makes a "
            f"{usual.kind.__name__}: something exchanged it. Load the pipeline anew without that."
        )
    check_processor(module, usual.processor, where)
    missing = usual.layers - _layers_of(module).keys()
    if missing:
        raise ValueError(f"{where} lacks its layer {min(missing)!r}, which its configuration makes: load it anew.")
    settings = _settings(module)
    changed = [name for name in settings if settings[name] != usual.settings.get(name)]
    if _FREEU & set(changed):
        shown = ", ".join(f"{name} = {settings[name]}" for name in sorted(_FREEU & set(changed)))
        raise ValueError(
            f"{where} has FreeU switched on ({shown}), which changes images while they are sampled and was not there "
            "in training: its losses are not the model's. Call `pipeline.disable_freeu()` first."
        )
    for name in changed:
        raise ValueError(
            f"{where} has {name} = {settings[name]!r} where its configuration makes {usual.settings.get(name)!r}: "
            "something set it by hand. Set it back, or change the configuration and load the pipeline anew."
        )
