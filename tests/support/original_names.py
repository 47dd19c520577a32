"""Models in the original names of single-file checkpoints: diffusers' renaming, the other way round."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def unet_in_original_names(unet: Any) -> dict[str, Tensor]:
    """A U-Net, without a prefix."""
    blocks: dict[str, str] = dict(_TOP)
    layers = unet.config.layers_per_block
    for level, block in enumerate(unet.down_blocks):
        first = 1 + level * (layers + 1)
        for layer in range(layers):
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{first + layer}.0"
            blocks[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{first + layer}.1"
        blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
        del block
    for layer in (0, 1):
        blocks[f"mid_block.resnets.{layer}"] = f"middle_block.{2 * layer}"
    blocks["mid_block.attentions.0"] = "middle_block.1"
    for level, block in enumerate(unet.up_blocks):
        first = level * (layers + 1)
        for layer in range(layers + 1):
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            blocks[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        place = 2 if hasattr(block, "attentions") else 1
        blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{place}.conv"
    result = {}
    for name, value in unet.state_dict().items():
        start = next(each for each in sorted(blocks, key=len, reverse=True) if name.startswith(f"{each}."))
        rest = name.removeprefix(f"{start}.")
        if ".resnets." in start:
            layer, _, end = rest.rpartition(".")
            rest = f"{_RESNET[layer]}.{end}"
        result[f"{blocks[start]}.{rest}"] = value
    return result


def vae_in_original_names(vae: Any) -> dict[str, Tensor]:
    """An autoencoder, without a prefix."""
    levels = len(vae.config.up_block_types)
    result = {}
    for name, value in vae.state_dict().items():
        key = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(
            r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}.block.{found[2]}", key
        )
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
        if "mid_block.attentions.0" in key:
            key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            key = re.sub(r"to_([qkv])", r"\1", key.replace("to_out.0", "proj_out"))
            value = value[:, :, None, None] if value.dim() == 2 else value
        result[key] = value
    return result


def clip_in_original_names(text: nn.Module) -> dict[str, Tensor]:
    """A CLIP in the names that transformers had when the checkpoints were made, without a prefix."""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": value
        for name, value in text.state_dict().items()
    }


def open_clip_in_original_names(text: nn.Module) -> dict[str, Tensor]:
    """A CLIP in OpenCLIP's names, without a prefix."""
    state = {name.removeprefix("text_model."): value for name, value in text.state_dict().items()}
    result = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
    }
    if "text_projection.weight" in state:
        result["text_projection"] = state.pop("text_projection.weight").T.contiguous()
    for name in list(state):
        block = name.replace("encoder.layers.", "transformer.resblocks.")
        if ".self_attn.q_proj." in name:
            end = name.rpartition(".")[2]
            three = [state.pop(name.replace("q_proj", f"{each}_proj")) for each in "qkv"]
            attention = block.replace(f"self_attn.q_proj.{end}", f"attn.in_proj_{end}")
            result[attention] = torch.cat(three)
        elif name in state and "self_attn.out_proj" in name:
            result[block.replace("self_attn", "attn")] = state.pop(name)
        elif name in state and "self_attn" not in name:
            for new, old in _OPEN_CLIP.items():
                block = block.replace(new, old)
            result[block] = state.pop(name)
    assert not state
    return result


def _swapped(value: Tensor) -> Tensor:
    """Scale and shift in the other order."""
    return torch.cat(list(value.chunk(2))[::-1])


def sd3_in_original_names(network: Any) -> dict[str, Tensor]:
    """Stable Diffusion 3's transformer, without a prefix."""
    state = dict(network.state_dict())
    result = {"pos_embed": state.pop("pos_embed.pos_embed")}
    tops = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }
    layers = network.config.num_layers
    for index in range(layers):
        ours, theirs = f"transformer_blocks.{index}", f"joint_blocks.{index}"
        for end in ("weight", "bias"):
            for side, names in (("x_block", "to_{}"), ("context_block", "add_{}_proj")):
                three = [state.pop(f"{ours}.attn.{names.format(each)}.{end}") for each in "qkv"]
                result[f"{theirs}.{side}.attn.qkv.{end}"] = torch.cat(three)
            last = state.pop(f"{ours}.norm1_context.linear.{end}")
            result[f"{theirs}.context_block.adaLN_modulation.1.{end}"] = _swapped(last) if index == layers - 1 else last
        tops |= {
            f"{ours}.norm1.linear": f"{theirs}.x_block.adaLN_modulation.1",
            f"{ours}.attn.to_out.0": f"{theirs}.x_block.attn.proj",
            f"{ours}.attn.to_add_out": f"{theirs}.context_block.attn.proj",
            f"{ours}.ff.net.0.proj": f"{theirs}.x_block.mlp.fc1",
            f"{ours}.ff.net.2": f"{theirs}.x_block.mlp.fc2",
            f"{ours}.ff_context.net.0.proj": f"{theirs}.context_block.mlp.fc1",
            f"{ours}.ff_context.net.2": f"{theirs}.context_block.mlp.fc2",
        }
    for end in ("weight", "bias"):
        result[f"final_layer.adaLN_modulation.1.{end}"] = _swapped(state.pop(f"norm_out.linear.{end}"))
    for name, value in state.items():
        layer, _, end = name.rpartition(".")
        result[f"{tops[layer]}.{end}"] = value
    return result


def checkpoint_tensors(pipeline: Any, kind: str) -> dict[str, Tensor]:
    """A whole pipeline's tensors as a checkpoint of this kind (sd1, sd2, sdxl, sd3) holds them."""
    flow = kind == "sd3"
    parts = {
        "model.diffusion_model.": sd3_in_original_names(pipeline.transformer)
        if flow
        else unet_in_original_names(pipeline.unet),
        "first_stage_model.": vae_in_original_names(pipeline.vae),
    }
    if kind == "sd1":
        parts["cond_stage_model.transformer."] = clip_in_original_names(pipeline.text_encoder)
    elif kind == "sd2":
        parts["cond_stage_model.model."] = open_clip_in_original_names(pipeline.text_encoder)
    elif kind == "sdxl":
        parts["conditioner.embedders.0.transformer."] = clip_in_original_names(pipeline.text_encoder)
        parts["conditioner.embedders.1.model."] = open_clip_in_original_names(pipeline.text_encoder_2)
    else:
        parts["text_encoders.clip_l.transformer."] = clip_in_original_names(pipeline.text_encoder)
        parts["text_encoders.clip_g.transformer."] = clip_in_original_names(pipeline.text_encoder_2)
        if pipeline.text_encoder_3 is not None:
            state = pipeline.text_encoder_3.state_dict()
            parts["text_encoders.t5xxl.transformer."] = {
                name: value for name, value in state.items() if name != "encoder.embed_tokens.weight"
            }
    return {f"{prefix}{name}": value for prefix, tensors in parts.items() for name, value in tensors.items()}


def save_checkpoint(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Writes a single-file checkpoint."""
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path, metadata)
    return path
