"""Adapters in a model as it is now: which weights are theirs, and which of them take part in its output.

An adapter's layer wraps a layer of the model, as peft does it. It may be disabled, inactive, at weight zero, or fused:
added to the wrapped weight, from which it can then not be told apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from wherefrom.runtime.artifacts import identity_hash
from wherefrom.runtime.tensor_hash import hash_tensors

_RECORDS = "wherefrom_adapters"


@dataclass(frozen=True)
class AdapterRecord:
    """What is known of an adapter in a model.

    Attributes:
        name: Of its file, or as the pipeline calls it.
        digest: Hash of its file or of its tensors.
        weight: How strongly it counts; None where its layers differ.
        fused: Whether some of it was added to the model's own weights, from which it cannot be told apart.
        network: Whether it changes the network, and not only text encoders.
        layers: What the network's layers call it; empty where it is not in them.
    """

    name: str
    digest: str
    weight: float | None = 1.0
    fused: bool = False
    network: bool = True
    layers: str = ""

    def __str__(self) -> str:
        weight = "at several weights" if self.weight is None else f"at {self.weight:g}"
        known = ", ".join([*(["fused"] if self.fused else []), *([self.digest[:8]] if self.digest else [])])
        return f"{self.name} {weight}{f' ({known})' if known else ''}"


def adapter_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of the layers that wrap one of the network's with adapters."""
    for name, module in network.named_modules():
        if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer"):
            yield name, module


def adapters_in(layer: Any) -> list[str]:
    """Names of the adapters that a layer has weights of, active or not."""
    parts = [getattr(layer, part, None) for part in layer.adapter_layer_names]
    return list(dict.fromkeys(name for part in parts if isinstance(part, nn.Module) for name in _entries(part)))


def _entries(part: nn.Module) -> list[str]:
    return list(part.keys()) if isinstance(part, nn.ModuleDict | nn.ParameterDict) else []


def active_in(layer: Any) -> tuple[str, ...]:
    """Names of the adapters that change a layer's output now; those that are fused have changed its weight before."""
    if layer.disable_adapters or layer.merged_adapters:
        return ()
    active = layer.active_adapters
    there = adapters_in(layer)
    return tuple(name for name in active if name in there)


def normed(layer: Any, adapter: str) -> bool:
    """Whether an adapter is of a kind whose gradients peft takes otherwise than those of the output (DoRA, …)."""
    return adapter in getattr(layer, "lora_variant", {})


def wrong_gradients(layer: Any, adapter: str) -> str:
    """Why gradients of an adapter's layer are not those of its output in peft 0.21; empty where they are."""
    if normed(layer, adapter):
        return "DoRA, or a kind like it, whose norm peft holds fixed"
    if adapter in getattr(layer, "hada_t1", {}):
        return "LoHa in Tucker form, whose gradients peft computes wrongly"
    return ""


def adapter_weights(network: nn.Module) -> dict[str, bool]:
    """Name -> whether it takes part, of all weights of adapters."""
    result: dict[str, bool] = {}
    for name, layer in adapter_layers(network):
        active = active_in(layer)
        for part in layer.adapter_layer_names:
            values = getattr(layer, part, None)
            if not isinstance(values, nn.ModuleDict | nn.ParameterDict):
                continue
            for adapter in values:
                scale = getattr(layer, "scaling", {}).get(adapter, 1.0)
                counts = adapter in active and (scale != 0 or normed(layer, adapter))
                path = f"{name}.{part}.{adapter}"
                value = values[adapter]
                inner = (
                    [f"{path}.{each}" for each, _ in value.named_parameters()]
                    if isinstance(value, nn.Module)
                    else [path]
                )
                result |= dict.fromkeys(inner, counts)
    return result


def adapter_scales(network: nn.Module) -> dict[str, float]:
    """How strongly each wrapped layer's adapters count, which no weight says."""
    scales: dict[str, float] = {}
    for name, layer in adapter_layers(network):
        known: Mapping[str, Any] = getattr(layer, "scaling", {})
        scales |= {f"{name}.{each}": float(known.get(each, 1.0)) for each in active_in(layer)}
    return scales


def adapter_identity(encoder: nn.Module) -> dict[str, Any]:
    """What an encoder's identity says of its adapters: the scales that are not 1; of those that take no part, 0.

    Its weights say the rest. An encoder without adapters, or with all of them active at scale 1, says nothing more.
    """
    there = {f"{name}.{each}": 0.0 for name, layer in adapter_layers(encoder) for each in adapters_in(layer)}
    scales = {name: scale for name, scale in {**there, **adapter_scales(encoder)}.items() if scale != 1.0}
    return {"adapters": identity_hash(scales)} if scales else {}


def check_adapters(network: nn.Module) -> None:
    """Refuses adapters in a state that is none of active, inactive, disabled and fused.

    Raises:
        ValueError: Adapters are fused and disabled at once, or a part of the model has been replaced by an adapter's.
    """
    for name, layer in adapter_layers(network):
        if layer.disable_adapters and layer.merged_adapters:
            raise ValueError(
                f"The layer {name} has adapters ({', '.join(layer.merged_adapters)}) that are fused and disabled at "
                "once: call unfuse_lora() or enable_lora() of the pipeline, so that it is clear which model is meant."
            )
    for name, module in network.named_modules():
        if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
            raise ValueError(
                f"The layer {name} was replaced as a whole by an adapter's (peft's modules_to_save), which is not "
                "supported: merge the adapter into its base (merge_and_unload), and give the merged model."
            )


def fused_adapters(network: nn.Module) -> list[str]:
    """Names of the adapters that are added to the network's own weights, as far as that can be seen."""
    merged = [each for _, layer in adapter_layers(network) for each in layer.merged_adapters]
    recorded = [each.name for each in vars(network).get(_RECORDS, ()) if each.fused and each.network]
    return list(dict.fromkeys([*merged, *recorded]))


def note_adapter(network: nn.Module, record: AdapterRecord) -> None:
    """Keeps with a network what was added to it; no weight and no configuration changes."""
    vars(network)[_RECORDS] = (*vars(network).get(_RECORDS, ()), record)


def known_adapters(network: nn.Module) -> tuple[AdapterRecord, ...]:
    """The adapters of a network that change what it computes now: those that were loaded here, and a pipeline's own."""
    seen = {each.name: each for each in _seen_adapters(network)}
    result = []
    for record in vars(network).get(_RECORDS, ()):
        if not record.layers:
            result.append(record)
        elif record.layers in seen:  # it may have been weighed otherwise since, fused or disabled
            now = seen.pop(record.layers)
            result.append(replace(record, weight=now.weight, fused=record.fused or now.fused))
        elif record.fused:
            result.append(record)
    return (*result, *seen.values())


def _seen_adapters(network: nn.Module) -> list[AdapterRecord]:
    """Adapters in the layers of a network, by the layers' names for them."""
    weights: dict[str, set[float]] = {}
    fused: dict[str, None] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for name, layer in adapter_layers(network):
        fused |= dict.fromkeys(layer.merged_adapters)
        for each in (*active_in(layer), *layer.merged_adapters):
            weights.setdefault(each, set()).add(_weight(layer, each))
            own = {path: value for path, value in layer.named_parameters() if not path.startswith("base_layer.")}
            mine = {f"{name}.{path}": value for path, value in own.items() if f".{each}." in f".{path}."}
            tensors.setdefault(each, {}).update(mine)
    return [
        AdapterRecord(
            name,
            hash_tensors(tensors[name]),
            next(iter(found)) if len(found) == 1 else None,
            name in fused,
            layers=name,
        )
        for name, found in weights.items()
    ]


def with_adapters(said: str, network: nn.Module) -> str:
    """What a page calls a model, and the adapters that change what it computes."""
    known = known_adapters(network)
    return f"{said} with LoRA {', '.join(map(str, known))}" if known else said


def _weight(layer: Any, adapter: str) -> float:
    """How strongly an adapter counts beside how strongly it was trained to."""
    alphas: Mapping[str, Any] = getattr(layer, "lora_alpha", None) or getattr(layer, "alpha", {})
    scale, alpha, rank = (
        values.get(adapter) for values in (getattr(layer, "scaling", {}), alphas, getattr(layer, "r", {}))
    )
    if not scale or not alpha or not rank:
        return 1.0 if scale is None else float(scale)
    root = getattr(layer, "use_rslora", {}).get(adapter, False)
    return round(float(scale * (rank**0.5 if root else rank) / alpha), 6)
