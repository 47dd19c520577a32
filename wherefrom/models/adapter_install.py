"""Puts an adapter's layers into a model: as peft's layers where it has such, and else into the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        if self.magnitude is not None or self.bias is not None:
            return False
        if isinstance(self.update, Hadamard):
            return "hada_t1" not in self.update.parts  # its gradients by peft are wrong; see `wrong_gradients`
        return isinstance(self.update, LowRank | Kronecker)


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
    base = base_layer(model.get_submodule(change.module))
    path, around = change.module, []
    while (layer := model.get_submodule(path)) is not base:
        around.append(layer)
        path = f"{path}.base_layer"
    before = list(getattr(around[0], "active_adapters", ())) if around else []
    made, config = _layer(around, base, change.update, name)
    made.scaling[name] = change.update.scale * weight
    if made not in around:  # below those that are there already: peft's convolutions wrap no other kind's
        made.train(base.training)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    active = list(dict.fromkeys([*before, name]))
    for each in (*around, made):
        each.set_adapter(active)  # which asks for their gradients
        for parameter_name, parameter in each.named_parameters():
            if any(f".{adapter}." in f".{parameter_name}." for adapter in active):
                parameter.requires_grad_(False)
    return config


def _layer(around: Sequence[Any], base: nn.Module, update: WeightUpdate, name: str) -> tuple[Any, Any]:
    """A layer of peft's for an adapter: one that is there already, or a new one; and its settings."""
    tuners = require_peft("An adapter").tuners
    if isinstance(update, LowRank):
        rank = int(update.down.shape[0])
        alpha = _whole(update.scale * rank)
        config = tuners.lora.LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False)
        settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "config": config}
        kinds, kind = tuners.lora.layer, tuners.lora.LoraLayer
    elif isinstance(update, Hadamard):
        rank = update.rank
        config = tuners.loha.LoHaConfig(r=rank, init_weights=False)
        settings = {"r": rank, "alpha": update.scale * rank, "config": config}
        kinds, kind = tuners.loha.layer, tuners.loha.layer.LoHaLayer
    else:
        assert isinstance(update, Kronecker)
        rank = update.rank or 1
        config = tuners.lokr.LoKrConfig(r=rank, init_weights=False)
        settings = {"r": rank, "alpha": update.scale * rank, "config": config}
        kinds, kind = tuners.lokr.layer, tuners.lokr.layer.LoKrLayer
    there = [each for each in around if isinstance(each, kind)]
    if there:
        layer: Any = there[0]
        layer.update_layer(name, **settings)
    else:
        made = kinds.Conv2d if isinstance(base, nn.Conv2d) else kinds.Linear
        layer = made(base, name, **settings)
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
    wrapping: Any = model.get_submodule(change.module)
    there = []
    while wrapping is not base_layer(wrapping):
        there += [wrapping] if name in wrapping.scaling else []
        wrapping = wrapping.base_layer
    if len(there) != 1:
        return False
    layer: Any = there[0]
    update = change.update
    scale = 0.0 if update is None else update.scale * weight
    if name not in layer.active_adapters or abs(layer.scaling[name] - scale) > 1e-6 * abs(scale):
        return False
    if isinstance(update, LowRank):
        pairs = [(layer.lora_A[name].weight, update.down), (layer.lora_B[name].weight, update.up)]
    else:
        assert isinstance(update, Hadamard | Kronecker)
        pairs = [(getattr(layer, part)[name], value) for part, value in update.parts.items()]
    return all(torch.equal(held.flatten().cpu(), given.flatten().to(held.dtype).cpu()) for held, given in pairs)
