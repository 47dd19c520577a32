"""Settings that decide what a part computes although no weight shows them: heads, groups, activations, epsilons.

Two networks of the same weights but of another number of heads compute different things, so such settings belong to
their identities. They enter only where they are not the usual ones, which are the class's own, or, for heads and
groups, those of the released models and of ours: what was stored for these before is found again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import PreTrainedModel

from wherefrom.runtime.artifacts import identity_hash

Usual = Callable[[Any], Mapping[str, Any]]


def _groups(width: int) -> int:
    """Groups of a network's normalizations by the width of its first level."""
    return 32 if width >= 128 else 8 if width >= 16 else 4


def _unet(config: Any) -> dict[str, Any]:
    """Stable Diffusion 1 has 8 heads at every level, 2 and XL have heads of 64; ours have 4, and the smallest 2."""
    widths = list(config.block_out_channels)
    if widths[0] >= 320 and config.cross_attention_dim in (1024, 2048):
        heads: Any = [width // 64 for width in widths]
    else:
        heads = [8 if widths[0] >= 128 else 4 if widths[0] >= 16 else 2] * len(widths)
    return {"attention_head_dim": heads, "norm_num_groups": _groups(widths[0])}


def _pixart(config: Any) -> dict[str, Any]:
    width = config.num_attention_heads * config.attention_head_dim
    return {"num_attention_heads": 16 if width >= 1152 else 8 if width >= 64 else 2}


def _sd3(config: Any) -> dict[str, Any]:
    return {"num_attention_heads": max(2, config.num_attention_heads * config.attention_head_dim // 64)}


def _autoencoder(config: Any) -> dict[str, Any]:
    return {"norm_num_groups": _groups(config.block_out_channels[0])}


# Class -> its settings that weights do not show, and the usual values where these are not the class's own.
_SETTINGS: Mapping[type, tuple[tuple[str, ...], Usual]] = {
    UNet2DConditionModel: (
        (
            "center_input_sample",
            "flip_sin_to_cos",
            "freq_shift",
            "only_cross_attention",
            "downsample_padding",
            "mid_block_scale_factor",
            "act_fn",
            "norm_num_groups",
            "norm_eps",
            "attention_head_dim",
            "resnet_skip_time_act",
            "resnet_out_scale_factor",
            "time_embedding_type",
            "time_embedding_act_fn",
            "timestep_post_act",
            "class_embeddings_concat",
            "mid_block_only_cross_attention",
            "addition_embed_type_num_heads",
        ),
        _unet,
    ),
    PixArtTransformer2DModel: (("num_attention_heads", "activation_fn", "norm_eps", "norm_type"), _pixart),
    SD3Transformer2DModel: (("num_attention_heads",), _sd3),
    AutoencoderKL: (("act_fn", "norm_num_groups"), _autoencoder),
    AsymmetricAutoencoderKL: (("act_fn", "norm_num_groups"), lambda config: {}),
    AutoencoderTiny: (("act_fn", "upsample_fn", "upsampling_scaling_factor"), lambda config: {}),
}
# Settings of transformers' text models under the names that their configurations have for them.
_HEADS = ("num_attention_heads", "num_heads")
_TEXT = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "feed_forward_proj",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "relative_attention_max_distance",
    "position_embedding_type",
    "is_decoder",
)
_MINILM = {384: 12}  # its heads are 32 wide, where other text encoders have 64


def _of_network(part: nn.Module, kind: type) -> dict[str, Any]:
    names, usual_of = _SETTINGS[kind]
    config: Any = part.config
    usual, parameters = usual_of(config), inspect.signature(kind).parameters
    result = {}
    for name in names:
        value = config.get(name, parameters[name].default)
        expected = usual.get(name, parameters[name].default)
        if isinstance(expected, list) and not isinstance(value, list | tuple):
            value = [value] * len(expected)
        value = list(value) if isinstance(value, tuple) else value
        if value != expected:
            result[name] = value
    half = next(part.parameters()).dtype not in (torch.float32, torch.float64)
    if half and config.get("upcast_attention"):
        result["upcast_attention"] = True
    if isinstance(part, PixArtTransformer2DModel):  # positions: sizes over their scale are 64 in all that were released
        side = int(config.sample_size)
        scale = config.interpolation_scale if config.interpolation_scale is not None else max(side // 64, 1)
        if side / scale != min(side, 64):
            result["interpolation_scale"] = scale
    return result


def _of_text_model(part: PreTrainedModel) -> dict[str, Any]:
    config: Any = part.config.get_text_config()
    default: Any = type(config)()
    heads = next((name for name in _HEADS if hasattr(config, name)), None)
    width: Any = config.d_kv * config.num_heads if hasattr(config, "d_kv") else getattr(config, "hidden_size", None)
    usual: dict[str, Any] = {"position_embedding_type": "absolute"}
    if heads is not None and width is not None:
        usual[heads] = _MINILM.get(width, max(2, width // 64))
    if config.model_type.startswith("clip"):
        usual["hidden_act"] = "quick_gelu" if width <= 768 else "gelu"
    if getattr(config, "is_gated_act", False):  # T5: whether there is a gate shows, which activation it has does not
        usual["feed_forward_proj"] = "gated-gelu"
    names = _TEXT if heads is None else (heads, *_TEXT)
    said = {name: getattr(config, name, None) for name in names}
    return {
        name: value
        for name, value in said.items()
        if value is not None and value != usual.get(name, getattr(default, name, None))
    }


def deciding_settings(part: nn.Module) -> dict[str, Any]:
    """The settings that decide what a part computes, that no weight shows, and that are not the usual ones.

    Args:
        part: Network, autoencoder or text encoder; one of another library's has none that are known.
    """
    kind = next((each for each in _SETTINGS if isinstance(part, each)), None)
    if kind is not None:
        return _of_network(part, kind)
    if isinstance(part, PreTrainedModel):
        return _of_text_model(part)
    return {}


def settings_hash(*parts: nn.Module) -> str:
    """A hash of the parts' deciding settings; empty where all are the usual ones."""
    settings = [deciding_settings(part) for part in parts]
    return identity_hash({"settings": settings}) if any(settings) else ""
