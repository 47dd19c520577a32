"""Models as diffusers pipeline folders: what we train is saved as one, and any Stable-Diffusion-like one is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from transformers import AutoModel

from wherefrom.diffusion import DiffusionModel, ForwardProcess, sampling_scheduler
from wherefrom.parts import CaptionEncoder, LatentEncoder, freeze, resolve_path
from wherefrom.storage import write_json

TEXT_SOURCE = "text_encoder/source.json"


def save_pipeline(folder: Path, model: DiffusionModel, text_source: str, dtype: torch.dtype = torch.float16) -> None:
    """Saves denoiser, autoencoder, scheduler and tokenizer as a diffusers pipeline folder.

    The text encoder is frozen and large, so the folder names where it comes from instead of holding a copy;
    `load_pipeline` follows that name.

    Args:
        folder: Where to save.
        model: The model; its encoder must be set. Its weights are rounded to `dtype` in place of a copy on disk only.
        text_source: Path, hub id or `package:NAME/FOLDER` of the text encoder.
        dtype: Type of number of the saved weights.

    Raises:
        ValueError: The model has no encoder.
    """
    if model.encoder is None:
        raise ValueError("A pipeline needs an encoder (autoencoder and text encoder); the model has none.")
    folder.mkdir(parents=True, exist_ok=True)
    denoiser: Any = model.denoiser
    for name, part in (("unet", denoiser), ("vae", model.encoder.vae)):
        rounded = type(part).from_config(part.config)
        rounded.load_state_dict(part.state_dict())
        rounded.to(dtype).save_pretrained(folder / name)
    sampling_scheduler(model.process).save_pretrained(folder / "scheduler")
    tokenizer = model.encoder.text.tokenizer
    tokenizer.model_max_length = model.encoder.text.length
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "text_encoder").mkdir(exist_ok=True)
    write_json(folder / TEXT_SOURCE, {"path": text_source})
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": diffusers.__version__,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", type(model.encoder.text.model).__name__],
            "tokenizer": ["transformers", type(tokenizer).__name__],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def load_pipeline(path: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Loads a diffusers pipeline from a folder or a hub id.

    Raises:
        OSError: There is no pipeline at that path.
        ValueError: The path is neither a folder nor a hub id.
    """
    source = Path(path) / TEXT_SOURCE
    parts: dict[str, Any] = {}
    if source.is_file():
        text = AutoModel.from_pretrained(resolve_path(json.loads(source.read_text())["path"]))
        parts["text_encoder"] = text.to(dtype)
    return DiffusionPipeline.from_pretrained(path, dtype=dtype, low_cpu_mem_usage=False, **parts)


def model_from_pipeline(pipeline: DiffusionPipeline) -> DiffusionModel:
    """The parts of a loaded pipeline as a `DiffusionModel`, frozen and in evaluation mode.

    Raises:
        ValueError: The pipeline's denoiser is not a text-conditioned U-Net, or it has no autoencoder.
    """
    parts = pipeline.components
    unet, vae, text, tokenizer = (parts.get(name) for name in ("unet", "vae", "text_encoder", "tokenizer"))
    if not isinstance(unet, UNet2DConditionModel) or vae is None or text is None or tokenizer is None:
        raise ValueError(
            f"{type(pipeline).__name__} is not supported: a UNet2DConditionModel, an autoencoder, a text encoder "
            "and a tokenizer are needed; "
            f"it has {', '.join(name for name, part in parts.items() if part is not None)}."
        )
    freeze(unet)
    encoder = LatentEncoder(vae, CaptionEncoder(text, tokenizer, token_limit(text, tokenizer)))
    return DiffusionModel(unet, ForwardProcess(parts["scheduler"]), encoder)


def token_limit(text: Any, tokenizer: Any) -> int:
    """Tokens of a caption: as the tokenizer says, but no more than the text encoder has positions for."""
    limit = int(tokenizer.model_max_length)  # a huge number where the tokenizer's files do not say
    return min(limit, int(getattr(text.config, "max_position_embeddings", limit)))


def load_model(path: str, dtype: torch.dtype = torch.float32) -> DiffusionModel:
    """`model_from_pipeline` of `load_pipeline`.

    Raises:
        OSError: There is no pipeline at that path.
        ValueError: The path is neither a folder nor a hub id, or the pipeline is of a kind that is not supported.
    """
    return model_from_pipeline(load_pipeline(path, dtype))
