"""Tiny random pipelines of the released models' own classes, saved by diffusers itself."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.support.tiny import tiny_unet, tiny_vae, unet_config
from wherefrom.data.image_set import ImageSet
from wherefrom.models.factories import unet_from_config

TOKENS = 77
WIDTH = 12
TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROMPTS = ["a big red square", "a small blue circle", "stripes"]


def images(count: int = 5, size: int = 8) -> ImageSet:
    """Random images whose captions begin with the prompts."""
    random = np.random.default_rng(0)
    return ImageSet(
        tuple(f"picture/{index}" for index in range(count)),
        tuple((f"{PROMPTS[index % 3]} number {index}",) for index in range(count)),
        random.integers(0, 255, (count, size, size, 3), dtype=np.uint8),
        {"license": ("CC0-1.0",) * count},
        f"random-{count}-{size}",
    )


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


def t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with one token a letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in "▁" + string.ascii_lowercase)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def t5_text(width: int = 24) -> T5EncoderModel:
    """A T5 encoder of one layer."""
    config = T5Config(
        vocab_size=40, d_model=width, d_kv=6, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return T5EncoderModel(config)


def stable_diffusion_xl(folder: Path, **parts: Any) -> Path:
    """SDXL: two text encoders, a pooled vector and size ids beside the time embedding."""
    changes = {
        "cross_attention_dim": 20,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 10 + 6 * 4,
    }
    pipeline = StableDiffusionXLPipeline(
        **{
            "vae": tiny_vae(),
            "text_encoder": clip_text(12),
            "text_encoder_2": clip_text(8, projection=10, seed=1),
            "tokenizer": clip_tokenizer(),
            "tokenizer_2": clip_tokenizer("!"),
            "unet": unet_with(**changes),
            "scheduler": EulerDiscreteScheduler(**TRAINED, steps_offset=1),
            "add_watermarker": False,
            **parts,
        }
    )
    pipeline.save_pretrained(folder)
    return folder


def pixart_transformer(**changes: Any) -> PixArtTransformer2DModel:
    """PixArt's transformer of one block, which also says how sure it is."""
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "sample_size": 4,
        "patch_size": 2,
        "caption_channels": 24,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PixArtTransformer2DModel(**{**settings, **changes})
    return network


def pixart(folder: Path, **parts: Any) -> Path:
    """PixArt-alpha: T5's states under a mask."""
    pipeline = PixArtAlphaPipeline(
        **{
            "vae": tiny_vae(),
            "text_encoder": t5_text(),
            "tokenizer": t5_tokenizer(),
            "transformer": pixart_transformer(),
            "scheduler": DPMSolverMultistepScheduler(beta_schedule="linear"),
            **parts,
        }
    )
    pipeline.save_pretrained(folder)
    return folder


def sd3_transformer(**changes: Any) -> SD3Transformer2DModel:
    """Stable Diffusion 3's transformer of two blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
            **changes,
        )


def stable_diffusion_3(folder: Path, t5: bool = True, **parts: Any) -> Path:
    """Stable Diffusion 3: flow matching, two CLIPs and T5, which may be left out."""
    pipeline = StableDiffusion3Pipeline(
        **{
            "vae": tiny_vae_of(4),
            "text_encoder": clip_text(12, projection=6),
            "text_encoder_2": clip_text(8, projection=10, seed=1),
            "text_encoder_3": t5_text() if t5 else None,
            "tokenizer": clip_tokenizer(),
            "tokenizer_2": clip_tokenizer("!"),
            "tokenizer_3": t5_tokenizer() if t5 else None,
            "transformer": sd3_transformer(),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            **parts,
        }
    )
    pipeline.save_pretrained(folder)
    return folder
