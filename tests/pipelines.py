"""Tiny random pipelines of the released models' own classes, saved by diffusers itself."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.tiny import tiny_unet, tiny_vae, unet_config
from wherefrom.parts import unet_from_config

TOKENS = 77
WIDTH = 12
TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer with one token a letter."""
    letters = string.ascii_lowercase + string.digits + ",."
    words = [*letters, *(f"{letter}</w>" for letter in letters), "!", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=TOKENS)


def clip_text(width: int = WIDTH, projection: int | None = None, seed: int = 0) -> CLIPTextModel:
    """A CLIP text encoder of two layers, with a projected pooled vector where its width is given."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=projection or WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)
        stretch(model, 10.0)
    return model


def stretch(module: nn.Module, factor: float) -> nn.Module:
    """Makes the initial weights larger, so that prompts differ by more than rounding."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter *= factor
    return module


def stable_diffusion(folder: Path, version: int = 1, unet: nn.Module | None = None, **parts: Any) -> Path:
    """Stable Diffusion 1 (predicts noise, pads with the end token) or 2 (predicts velocity, pads with !)."""
    scheduler: Any = (
        PNDMScheduler(**TRAINED, skip_prk_steps=True, steps_offset=1)
        if version == 1
        else DDIMScheduler(**TRAINED, prediction_type="v_prediction", steps_offset=1, clip_sample=False)
    )
    pipeline = StableDiffusionPipeline(
        **{
            "vae": tiny_vae(),
            "text_encoder": clip_text(),
            "tokenizer": clip_tokenizer("<|endoftext|>" if version == 1 else "!"),
            "unet": tiny_unet() if unet is None else unet,
            "scheduler": scheduler,
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
            **parts,
        }
    )
    pipeline.save_pretrained(folder)
    return folder


def unet_with(**changes: Any) -> nn.Module:
    """The tiny U-Net with other settings."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return unet_from_config({**unet_config(), **changes})


def tiny_vae_of(channels: int) -> AutoencoderKL:
    """A tiny autoencoder with this many latent channels."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return AutoencoderKL.from_config({**tiny_vae().config, "latent_channels": channels, "shift_factor": 0.06})
