"""Finds the layers of an adapter's file in a model, and counts what has a place there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom.models.adapter_files import AdapterFile, FileLayer
from wherefrom.models.adapter_install import LayerUpdate, base_layer
from wherefrom.models.adapter_settings import LayerScales
from wherefrom.models.adapter_weights import (
    Hadamard,
    Kronecker,
    LowRank,
    WeightUpdate,
    Whole,
    is_norm,
    merged_middle,
)
from wherefrom.models.layer_names import Place, flattened, network_names, text_names

NETWORK = "network"
TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
Scale = Callable[[int | None], float]
# How names of layers begin -> whose they are; the longest first. With `_` for points, as kohya's trainer writes them:
_FLAT = {
    "lora_transformer_": NETWORK,
    "lora_unet_": NETWORK,
    "lora_te1_": TEXTS[0],
    "lora_te2_": TEXTS[1],
    "lora_te3_": TEXTS[2],
    "lora_te_": TEXTS[0],
    "lycoris_": NETWORK,
}
_DOTTED = {
    "text_encoders.t5xxl.transformer.": TEXTS[2],
    "text_encoders.clip_l.transformer.": TEXTS[0],
    "text_encoders.clip_g.transformer.": TEXTS[1],
    "model.diffusion_model.": NETWORK,
    "text_encoder_2.": TEXTS[1],
    "text_encoder_3.": TEXTS[2],
    "diffusion_model.": NETWORK,
    "text_encoder.": TEXTS[0],
    "transformer.": NETWORK,
    "unet.": NETWORK,
}
_WRAPPED = "base_model.model."  # how peft's own files begin
# Width of the prompt embeddings that a cross-attention's keys read -> the models that have it.
_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL", 1152: "PixArt"}


class Component:
    """The layers of one part of a model, by all names that adapters know them by."""

    def __init__(self, model: nn.Module, text: bool) -> None:
        self.model = model
        self.layers = dict(_layers(model))
        self.dotted = text_names(self.layers) if text else network_names(self.layers)
        self.flat = flattened(self.dotted)


def _layers(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """(name, layer) of the layers with weights, adapters around them looked through."""
    wrapped: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(each) for each in wrapped):
            continue
        base = base_layer(module)
        if base is not module:
            wrapped.append(f"{name}.")
        if isinstance(getattr(base, "weight", None), Tensor):
            yield name, base


@dataclass
class Fit:
    """What of a file belongs to the model."""

    changes: list[tuple[str, LayerUpdate]] = field(default_factory=list)
    fits: int = 0
    others: list[str] = field(default_factory=list)
    hints: dict[str, None] = field(default_factory=dict)

    def missed(self, layer: FileLayer, hint: str) -> None:
        """Counts a layer's tensors as those that do not fit."""
        self.others += layer.keys.values()
        self.hints |= {hint: None} if hint else {}


def _find(name: str, components: Mapping[str, Component]) -> tuple[str, list[Place]]:
    """Whose layer it is, and where; no place where there is none."""
    for prefix, owner in _FLAT.items():
        if name.startswith(prefix):
            known = components[owner].flat if owner in components else {}
            return owner, known.get(name.removeprefix(prefix), [])
    bare = name.removeprefix(_WRAPPED)
    owner = NETWORK
    for prefix, each in _DOTTED.items():
        if bare.startswith(prefix):
            owner, bare = each, bare.removeprefix(prefix)
            break
    return owner, components[owner].dotted.get(bare.removeprefix(_WRAPPED), []) if owner in components else []


def _update(parts: Mapping[str, Tensor], scale: Scale) -> tuple[WeightUpdate | None, set[str]]:
    """What a layer's tensors mean together, and which of them it uses.

    Args:
        parts: Part -> tensor.
        scale: Gives the scale of a rank.
    """
    loha = {name: value for name, value in parts.items() if name.startswith("hada_")}
    lokr = {name: value for name, value in parts.items() if name.startswith("lokr_")}
    if {"down", "up"} <= parts.keys():
        down, middle = parts["down"], parts.get("middle")
        used = {"down", "up"} | ({"middle"} if middle is not None else set())
        down = down if middle is None else merged_middle(middle, down)
        return LowRank(down, parts["up"], scale(int(down.shape[0]))), used
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= loha.keys():
        made = Hadamard(loha, 1.0)
        return Hadamard(loha, scale(made.rank)), set(loha)
    sides = [f"lokr_w{side}" in lokr or {f"lokr_w{side}_a", f"lokr_w{side}_b"} <= lokr.keys() for side in "12"]
    if all(sides):
        rank = Kronecker(lokr, 1.0).rank
        return Kronecker(lokr, scale(rank)), set(lokr)
    if "diff" in parts:
        return Whole(parts["diff"]), {"diff"}
    return None, set()


def _fits(update: WeightUpdate | None, shape: tuple[int, ...]) -> bool:
    """Whether an update makes a weight of this shape."""
    if isinstance(update, LowRank):
        down, up = update.down, update.up
        window = down.shape[2:]
        return (
            up.dim() in (2, len(shape), 4)
            and up.shape[0] == shape[0]
            and up[0].numel() == down.shape[0]
            and (down[0].numel() * shape[0] == torch.Size(shape).numel())
            and (all(side == 1 for side in (*window, *shape[2:])) or tuple(window) == tuple(shape[2:]))
        )
    if update is None:
        return True
    try:
        made = update.delta(shape)
    except (RuntimeError, IndexError):
        return False
    return tuple(made.shape) == shape and _rows_of(update) in (None, shape[0])


def _rows_of(update: WeightUpdate) -> int | None:
    """Rows of an update before it is brought to its layer's shape."""
    if isinstance(update, Hadamard):
        sides = update.parts["hada_w1_a"]
        return int(sides.shape[1] if "hada_t1" in update.parts else sides.shape[0])
    if isinstance(update, Kronecker):
        parts = update.parts
        left = (parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"]).shape[0]
        right = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"]
        return int(left * right.shape[1 if "lokr_t2" in parts else 0])
    return None


def _change(layer: FileLayer, place: Place, base: nn.Module, scale: Scale) -> LayerUpdate | None:
    """What a file's layer changes of one of the model's; None where it does not fit."""
    parts = {name: value.float() if value.dtype.itemsize < 4 else value for name, value in layer.parts.items()}
    update, used = _update(parts, scale)
    magnitude, bias = parts.get("dora_scale"), parts.get("diff_b")
    if "magnitude" in parts:
        magnitude = parts["magnitude"].flatten()  # peft's is each output's, whatever its shape
    norms = {"magnitude", "dora_scale"} & parts.keys()
    left = parts.keys() - used - {"alpha", "diff_b"} - norms
    if left or len(norms) > 1 or (update is None and (bias is None or norms)):
        return None
    weight: Any = base.weight
    shape, own_bias = tuple(weight.shape), getattr(base, "bias", None)
    if place.rows is not None:
        whole = (shape[0] * place.of, *shape[1:])
        if not _fits(update, whole):
            return None
        update = None if update is None else update.rows(place.rows, whole)
        if magnitude is not None and magnitude.shape[0] != whole[0]:
            return None  # the norm of all of them is none of each
        magnitude = None if magnitude is None else place.rows(magnitude)
        bias = None if bias is None else place.rows(bias)
    if not _fits(update, shape) or (bias is not None and (own_bias is None or own_bias.shape != bias.shape)):
        return None
    if isinstance(update, LowRank | Hadamard | Kronecker) and not isinstance(base, nn.Linear | nn.Conv2d):
        return None
    if magnitude is not None and not is_norm(magnitude, shape):
        return None
    return LayerUpdate(place.module, update, magnitude, bias)


def _scale(layer: FileLayer, scales: LayerScales, module: str) -> Scale:
    """Gives a layer's scale for its rank."""
    alpha = layer.parts.get("alpha")
    if alpha is None:
        return lambda rank: scales.of(module, rank)
    return lambda rank: 1.0 if rank is None else float(alpha) / rank  # LyCORIS: what is all whole has no scale


def match(file: AdapterFile, components: Mapping[str, Component]) -> Fit:
    """Finds every layer of a file in the model.

    Args:
        file: The adapter.
        components: The model's parts by their names.
    """
    result, taken = Fit(others=list(file.unknown)), set[tuple[str, str]]()
    for name, layer in file.layers.items():
        owner, places = _find(name, components)
        sound = all(part != "alpha" or value.numel() == 1 for part, value in layer.parts.items())
        scales = file.settings.of(*(("unet", "transformer") if owner == NETWORK else (owner,)))
        changes = [
            _change(layer, place, components[owner].layers[place.module], _scale(layer, scales, place.module))
            for place in (places if sound else [])
        ]
        fitting = [(owner, change) for change in changes if change is not None]
        twice = any((owner, change.module) in taken for _, change in fitting)  # by another of its names
        if not fitting or len(fitting) < len(changes) or twice:
            result.missed(layer, _hint(name, layer))
            continue
        taken |= {(owner, change.module) for _, change in fitting}
        result.changes += fitting
        result.fits += len(layer.keys)
    return result


def _hint(name: str, layer: FileLayer) -> str:
    """Which base a layer that does not fit looks like; empty where it says nothing."""
    flat = name.replace(".", "_")
    if "double_blocks" in flat or "single_transformer_blocks" in flat or "single_blocks" in flat:
        return "Flux"
    if "joint_blocks" in flat or "attn_add_" in flat:
        return "Stable Diffusion 3"
    if "lora_te2_" in flat or "text_encoder_2" in flat or "input_blocks" in flat or "output_blocks" in flat:
        return "SDXL"
    if "attn2_to_k" in flat or "attn2_to_v" in flat:
        down = layer.parts.get("down")
        return "" if down is None else _WIDTHS.get(down[0].numel(), "")
    return ""


def refusal(file: AdapterFile, fit: Fit) -> ValueError:
    """The error that says how much of a file fits the model, and what does not."""
    first = ", ".join(repr(key) for key in sorted(fit.others)[:2])
    likely = file.base or " or ".join(list(fit.hints)[:2])
    why = (
        f"it was trained for another base ({likely}{'' if file.base else '?'})"
        if likely
        else ("it was trained for another base, or with a kind of layer that is not supported")
    )
    return ValueError(
        f"{fit.fits} of {file.tensors} tensors of {file.path} fit this model; {first} "
        f"{'does' if len(fit.others) == 1 else 'do'} not: {why}. Give the base that it was trained for."
    )
