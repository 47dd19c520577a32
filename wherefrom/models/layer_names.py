"""What trainers call the layers of a network: their names in diffusers, and in the models' first code.

Adapters of Stable Diffusion 1 and 2 mostly use diffusers' names, those of XL and 3 often the ones of Stability's code,
where one layer may be three of diffusers' (queries, keys and values in one).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.models.adapter_weights import Rows


@dataclass(frozen=True)
class Place:
    """Where an adapter's layer belongs.

    Attributes:
        module: The module's name in diffusers.
        rows: Which rows of the adapter's weight are this module's; None is all, in their order.
        of: How many times the module's rows the adapter's weight has.
    """

    module: str
    rows: Rows | None = None
    of: int = 1


@dataclass(frozen=True)
class Third:
    """One of the three equal parts of the rows."""

    which: int

    def __call__(self, rows: Tensor) -> Tensor:
        """That part."""
        return rows.chunk(3)[self.which]


def swapped_halves(rows: Tensor) -> Tensor:
    """Scale and shift in the other order."""
    first, second = rows.chunk(2)
    return torch.cat([second, first])


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_SD3_THIRDS = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
_SD3_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}


def _children(names: Iterable[str], prefix: str) -> int:
    """How many numbered children a module has."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def _unet_blocks(names: set[str]) -> dict[str, str]:
    """Module -> first name, of the blocks' parts: `down_blocks.0.resnets.0` is `input_blocks.1.0`."""
    parts: dict[str, str] = {}
    number = 1
    for block in range(_children(names, "down_blocks.")):
        here = f"down_blocks.{block}"
        for layer in range(_children(names, f"{here}.resnets.")):
            parts[f"{here}.resnets.{layer}"] = f"input_blocks.{number}.0"
            parts[f"{here}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if f"{here}.downsamplers.0.conv" in names:
            parts[f"{here}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    for layer in range(_children(names, "mid_block.resnets.")):
        parts[f"mid_block.resnets.{layer}"] = f"middle_block.{2 * layer}"
        parts[f"mid_block.attentions.{layer}"] = f"middle_block.{2 * layer + 1}"
    number = 0
    for block in range(_children(names, "up_blocks.")):
        here = f"up_blocks.{block}"
        for layer in range(_children(names, f"{here}.resnets.")):
            parts[f"{here}.resnets.{layer}"] = f"output_blocks.{number}.0"
            parts[f"{here}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        after = 2 if _children(names, f"{here}.attentions.") else 1
        parts[f"{here}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{after}.conv"
    return parts


def _first_names_of_unet(names: set[str]) -> dict[str, list[Place]]:
    """First name -> module of a U-Net."""
    blocks, result = _unet_blocks(names), {}
    for name in names:
        if name in _UNET_ENDS:
            result[_UNET_ENDS[name]] = [Place(name)]
        elif name in blocks:
            result[blocks[name]] = [Place(name)]
        elif found := re.match(r"((?:\w+_blocks\.\d+|mid_block)\.(resnets|attentions)\.\d+)\.(.+)$", name):
            part, kind, rest = found.groups()
            first = _RESNET.get(rest, rest) if kind == "resnets" else rest
            if part in blocks:
                result[f"{blocks[part]}.{first}"] = [Place(name)]
    return result


def _first_names_of_sd3(names: set[str]) -> dict[str, list[Place]]:
    """First name -> modules of a transformer of Stable Diffusion 3."""
    result = {first: [Place(name)] for name, first in _SD3_ENDS.items() if name in names}
    if "norm_out.linear" in names:
        result["final_layer.adaLN_modulation.1"] = [Place("norm_out.linear", swapped_halves)]
    last = _children(names, "transformer_blocks.") - 1
    for block in range(last + 1):
        here, there = f"transformer_blocks.{block}", f"joint_blocks.{block}"
        for name, first in _SD3_BLOCK.items():
            if f"{here}.{name}" in names:
                # The last block's context is only normed, with scale and shift in the other order.
                rows = swapped_halves if name == "norm1_context.linear" and block == last else None
                result[f"{there}.{first}"] = [Place(f"{here}.{name}", rows)]
        for first, thirds in _SD3_THIRDS.items():
            if all(f"{here}.{name}" in names for name in thirds):
                result[f"{there}.{first}"] = [Place(f"{here}.{name}", Third(n), 3) for n, name in enumerate(thirds)]
    return result


def network_names(names: Iterable[str]) -> dict[str, list[Place]]:
    """What a network's layers are called -> where they are.

    Args:
        names: The network's modules.
    """
    own = set(names)
    first = _first_names_of_unet(own) if "conv_in" in own else {}
    if any(name.startswith("transformer_blocks.0.attn.add_") for name in own):
        first = _first_names_of_sd3(own)
    return {**first, **{name: [Place(name)] for name in own}}


def text_names(names: Iterable[str]) -> dict[str, list[Place]]:
    """What a text encoder's layers are called, with `text_model.` before them or without, -> where they are."""
    result: dict[str, list[Place]] = {}
    for name in names:
        bare = name.removeprefix("text_model.")
        result |= {each: [Place(name)] for each in (name, bare, f"text_model.{bare}")}
    return result


def flattened(names: Mapping[str, list[Place]]) -> dict[str, list[Place]]:
    """The same with `_` for every point, as kohya's trainer writes them; a name that two would have is left out."""
    result: dict[str, list[Place]] = {}
    for name, places in names.items():
        flat = name.replace(".", "_")
        result[flat] = places if result.get(flat, places) == places else []
    return {name: places for name, places in result.items() if places}
