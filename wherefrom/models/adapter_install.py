"""Puts an adapter's layers into a model: as peft's layers where it has such, and else into the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom.models.adapter_weights import Hadamard, Kronecker, LowRank, WeightUpdate, decomposed
from wherefrom.runtime.optional_dependencies import require_peft


@dataclass(frozen=True)
class LayerUpdate:
    """What an adapter changes of one layer.

    Attributes:
        module: The layer's name.
        update: What is added to its weight; None is nothing.
        magnitude: DoRA's norms.
        bias: What is added to its bias.
    """

    module: str
    update: WeightUpdate | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def apart(self) -> bool:
        """Whether it can be kept apart from the layer's own weight."""
        return isinstance(self.update, LowRank | Hadamard | Kronecker) and self.magnitude is None and self.bias is None


def base_layer(module: nn.Module) -> Any:
    """The layer itself, below its adapters."""
    inner: Any = module
    while hasattr(inner, "adapter_layer_names") and hasattr(inner, "base_layer"):
        inner = inner.base_layer
    return inner


@torch.no_grad()
def merge(model: nn.Module, change: LayerUpdate, weight: float) -> None:
    """Changes a layer's own weights.

    Args:
        model: Holds the layer.
        change: What changes.
        weight: How strongly the adapter counts.
    """
    layer = base_layer(model.get_submodule(change.module))
    if change.update is not None:
        own = layer.weight
        delta = weight * change.update.delta(tuple(own.shape))
        wide = torch.promote_types(own.dtype, torch.float32)
        summed = own.to(wide) + delta.to(own.device, wide)
        if change.magnitude is not None:
            summed = decomposed(own.to(wide), delta.to(own.device, wide), change.magnitude.to(own.device, wide))
        own.copy_(summed)
    if change.bias is not None:
        layer.bias.add_((weight * change.bias).to(layer.bias.device, layer.bias.dtype))


@torch.no_grad()
def wrap(model: nn.Module, change: LayerUpdate, name: str, weight: float) -> Any:
    """Wraps a layer with an adapter's, in peft's own classes, and returns peft's settings of it.

    Args:
        model: Holds the layer.
        change: What is wrapped around it.
        name: Of the adapter, in the model.
        weight: How strongly the adapter counts.
    """
    assert change.update is not None
    target: Any = model.get_submodule(change.module)
    base = base_layer(target)
    before = list(target.active_adapters) if target is not base else []
    made, config = _layer(target, base, change.update, name)
    layer: Any = made
    layer.scaling[name] = change.update.scale * weight
    if layer is not target:
        layer.train(base.training)
        parent, _, child = change.module.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(owner, nn.ModuleList | nn.Sequential):
            owner[int(child)] = layer
        else:
            setattr(owner, child, layer)
    active = list(dict.fromkeys([*before, name]))
    inner = layer
    while inner is not base:
        inner.set_adapter(active)
        inner = inner.base_layer
    for path, parameter in layer.named_parameters():
        if f".{name}." in f".{path}.":
            parameter.requires_grad_(False)
    return config


def _layer(target: Any, base: nn.Module, update: WeightUpdate | None, name: str) -> tuple[nn.Module, Any]:
    """A layer of peft's around a target, or the target itself where it is of that class already; its settings."""
    tuners = require_peft("An adapter").tuners
    convolution = isinstance(base, nn.Conv2d)
    if isinstance(update, LowRank):
        rank = int(update.down.shape[0])
        alpha = _whole(update.scale * rank)
        config = tuners.lora.LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False)
        settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "config": config}
        kinds, kind = tuners.lora.layer, tuners.lora.LoraLayer
    elif isinstance(update, Hadamard):
        rank, alpha = update.rank, update.scale * update.rank
        config = tuners.loha.LoHaConfig(r=rank, init_weights=False, use_effective_conv2d="hada_t1" in update.parts)
        settings = {"r": rank, "alpha": alpha, "config": config}
        kinds, kind = tuners.loha.layer, tuners.loha.layer.LoHaLayer
    else:
        assert isinstance(update, Kronecker)
        rank = update.rank or 1
        config = tuners.lokr.LoKrConfig(r=rank, init_weights=False)
        settings = {"r": rank, "alpha": update.scale * rank, "config": config}
        kinds, kind = tuners.lokr.layer, tuners.lokr.layer.LoKrLayer
    if isinstance(target, kind):
        layer: Any = target
        layer.update_layer(name, **settings)
    else:
        layer = (kinds.Conv2d if convolution else kinds.Linear)(target, name, **settings)
    own = next(base.parameters())
    if isinstance(update, LowRank):
        for part, value in ((layer.lora_A[name], update.down), (layer.lora_B[name], update.up)):
            shape = part.weight.shape
            part.weight = nn.Parameter(value.reshape(shape).to(own.device, own.dtype, copy=True))
    else:
        _set_parts(layer, name, update.parts, own)
    return layer, config


def _set_parts(layer: Any, name: str, parts: Mapping[str, Tensor], own: Tensor) -> None:
    """Puts the file's tensors, whose shapes its trainer chose, in place of those that peft has made."""
    for part in layer.adapter_layer_names:
        values = getattr(layer, part)
        if name in values:
            del values[name]
        if part in parts:
            values[name] = nn.Parameter(parts[part].to(own.device, own.dtype, copy=True))


def _whole(value: float) -> float:
    """α as it was written, which the product of scale and rank may miss by rounding."""
    return round(value) if abs(value - round(value)) < 1e-9 else value


def arrived(model: nn.Module, change: LayerUpdate, name: str, weight: float) -> bool:
    """Whether a wrapped layer holds the adapter's tensors, takes part, and counts as strongly as it should."""
    layer: Any = model.get_submodule(change.module)
    while name not in getattr(layer, "scaling", ()):
        if not hasattr(layer, "adapter_layer_names"):
            return False
        layer = layer.base_layer
    update = change.update
    scale = 0.0 if update is None else update.scale * weight
    if name not in layer.active_adapters or abs(layer.scaling[name] - scale) > 1e-6 * abs(scale):
        return False
    if isinstance(update, LowRank):
        pairs = [(layer.lora_A[name].weight, update.down), (layer.lora_B[name].weight, update.up)]
    else:
        assert isinstance(update, Hadamard | Kronecker)
        pairs = [(getattr(layer, part)[name], value) for part, value in update.parts.items()]
    return all(torch.equal(there.flatten().cpu(), given.flatten().to(there.dtype).cpu()) for there, given in pairs)
