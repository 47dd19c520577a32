"""Which family a network belongs to."""

from __future__ import annotations

from typing import Any

from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from wherefrom.models.families.base import Denoiser
from wherefrom.models.families.pixart import PixArtDenoiser
from wherefrom.models.families.stable_diffusion_3 import SD3Denoiser
from wherefrom.models.families.stable_diffusion_xl import SDXLDenoiser


def denoiser_of(network: nn.Module) -> Denoiser:
    """How a network is called, by its class; any other module is called like Stable Diffusion's U-Net.

    Raises:
        ValueError: A U-Net is told something else beside the caption.
    """
    if isinstance(network, SD3Transformer2DModel):
        return SD3Denoiser(network)
    if isinstance(network, PixArtTransformer2DModel):
        return PixArtDenoiser(network)
    if not isinstance(network, UNet2DConditionModel):
        return Denoiser(network)
    config: Any = network.config
    if config.addition_embed_type == "text_time":
        return SDXLDenoiser(network)
    for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"A U-Net with {name} {getattr(config, name)!r} is not supported: it is told more than the caption. "
                "Those of Stable Diffusion 1, 2 and XL are."
            )
    return Denoiser(network)
