"""New networks from their diffusers configuration, for YAML files."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, PixArtTransformer2DModel, UNet2DConditionModel


def autoencoder_from_config(config: dict[str, Any]) -> AutoencoderKL:
    """A new `AutoencoderKL` from its configuration; its constructor's type hints do not admit every valid one."""
    return AutoencoderKL.from_config(config)


def unet_from_config(config: dict[str, Any]) -> UNet2DConditionModel:
    """A new `UNet2DConditionModel` from its diffusers configuration."""
    return UNet2DConditionModel.from_config(config)


def transformer_from_config(config: dict[str, Any]) -> PixArtTransformer2DModel:
    """A new `PixArtTransformer2DModel` from its diffusers configuration."""
    return PixArtTransformer2DModel.from_config(config)
