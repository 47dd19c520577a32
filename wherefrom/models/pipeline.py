"""Models as diffusers pipeline folders: what we train is saved as one, and any Stable-Diffusion-like one is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DiffusionPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import AutoModel

from wherefrom.models.customization import base_of, customize, read_customization
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.encoders import CaptionEncoder, LatentEncoder, freeze
from wherefrom.models.noise_schedule import noise_schedule_of, pipeline_scheduler
from wherefrom.models.package_paths import resolve_path
from wherefrom.models.prompt_encoders import PixArtPrompts, PromptEncoder, SD3Prompts, SDXLPrompts
from wherefrom.runtime.artifacts import write_json
from wherefrom.runtime.optional_dependencies import require_peft

TEXT_SOURCE = "text_encoder/source.json"
LORA = "pytorch_lora_weights.safetensors"
_KINDS = (UNet2DConditionModel, PixArtTransformer2DModel, SD3Transformer2DModel)
# What can be saved, by the network's class: the pipeline's class, the network's name in it, and what it has no use for.
_SAVED: dict[type[nn.Module], tuple[str, str, dict[str, Any]]] = {
    UNet2DConditionModel: (
        "StableDiffusionPipeline",
        "unet",
        {
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
        },
    ),
    PixArtTransformer2DModel: ("PixArtAlphaPipeline", "transformer", {}),
}
# Tokens that T5 reads, as diffusers' pipelines set it where nothing else is asked for.
_ALPHA_TOKENS, _SIGMA_TOKENS, _T5_TOKENS = 120, 300, 256


def save_pipeline(folder: Path, model: DiffusionModel, text_source: str, dtype: torch.dtype = torch.float16) -> None:
    """Saves denoiser, autoencoder, scheduler and tokenizer as a diffusers pipeline folder.

    The text encoder is frozen and large, so the folder names where it comes from instead of holding a copy;
    `load_pipeline` follows that name.

    Args:
        folder: Where to save.
        model: The model; its encoder must be set. Its weights are rounded to `dtype` in place of a copy on disk only.
        text_source: Path, hub id (or a folder of one: `OWNER/NAME/FOLDER`) or `package:NAME/FOLDER` of the text
            encoder.
        dtype: Type of number of the saved weights.

    Raises:
        ValueError: The model has no encoder, or is of a kind that can be read only.
    """
    if model.encoder is None:
        raise ValueError("A pipeline needs an encoder (autoencoder and text encoder); the model has none.")
    denoiser: Any = model.denoiser
    saved = next((saved for kind, saved in _SAVED.items() if isinstance(denoiser, kind)), None)
    if saved is None or isinstance(model.encoder.text, SDXLPrompts):
        raise ValueError(
            f"{type(denoiser).__name__} cannot be saved: only models of one text encoder can, U-Nets as in Stable "
            "Diffusion 1 and 2 and transformers of PixArt. Save the pipeline that it came from with diffusers."
        )
    pipeline, name, others = saved
    folder.mkdir(parents=True, exist_ok=True)
    for part_name, part in ((name, denoiser), ("vae", model.encoder.vae)):
        rounded = type(part).from_config(part.config)
        rounded.load_state_dict(part.state_dict())
        rounded.to(dtype).save_pretrained(folder / part_name)
    scheduler = pipeline_scheduler(model.process)
    scheduler.save_pretrained(folder / "scheduler")
    text = model.encoder.text
    tokenizer, text_model = text.tokenizer, text.models[0] if isinstance(text, PromptEncoder) else text.model
    tokenizer.model_max_length = text.length
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "text_encoder").mkdir(exist_ok=True)
    write_json(folder / TEXT_SOURCE, {"path": text_source})
    write_json(
        folder / "model_index.json",
        {
            "_class_name": pipeline,
            "_diffusers_version": diffusers.__version__,
            **others,
            "scheduler": ["diffusers", type(scheduler).__name__],
            "text_encoder": ["transformers", type(text_model).__name__],
            "tokenizer": ["transformers", type(tokenizer).__name__],
            name: ["diffusers", type(denoiser).__name__],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def load_pipeline(path: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Loads a diffusers pipeline from a folder or a hub id.

    Where a folder holds `pytorch_lora_weights.safetensors`, as diffusers' training scripts and `save_lora_weights`
    write it, that adapter is loaded too.

    Raises:
        ImportError: There is an adapter, but peft is not installed.
        OSError: There is no pipeline at that path.
        ValueError: The path is neither a folder nor a hub id.
    """
    source, lora = Path(path) / TEXT_SOURCE, Path(path) / LORA
    if lora.is_file():
        require_peft(f"The adapter {lora}")
    parts: dict[str, Any] = {}
    if source.is_file():
        parts["text_encoder"] = _text_encoder(json.loads(source.read_text())["path"]).to(dtype)
    index = Path(path) / "model_index.json"
    if index.is_file():  # a text encoder that was left out must be named, or the pipeline takes it for a damaged one
        absent = [name for name, kind in json.loads(index.read_text()).items() if kind == [None, None]]
        parts |= dict.fromkeys(name for name in absent if name.startswith(("text_encoder", "tokenizer")))
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=dtype, low_cpu_mem_usage=False, **parts)
    network = _network(pipeline)
    if lora.is_file():
        loadable: Any = pipeline
        loadable.load_lora_weights(path, weight_name=LORA)
    if isinstance(network, nn.Module):
        network.to(dtype)  # some transformers stay in single precision whatever is asked for
    return pipeline


def _text_encoder(path: str) -> nn.Module:
    """A text encoder from a folder, `package:NAME/FOLDER`, a hub id, or a folder of a hub id (`OWNER/NAME/FOLDER`)."""
    resolved = resolve_path(path)
    parts = resolved.split("/")
    if len(parts) > 2 and not Path(resolved).exists() and parts[0]:
        result: nn.Module = AutoModel.from_pretrained("/".join(parts[:2]), subfolder="/".join(parts[2:]))
    else:
        result = AutoModel.from_pretrained(resolved)
    return result


def model_from_pipeline(pipeline: DiffusionPipeline) -> DiffusionModel:
    """The parts of a loaded pipeline as a `DiffusionModel`, frozen and in evaluation mode.

    Raises:
        ValueError: The pipeline's network is of a kind that is not supported, cannot read captions or takes more than
            noisy latents; or a part is missing.
    """
    parts = pipeline.components
    network, vae = _network(pipeline), parts.get("vae")
    kind = next((kind for kind in _KINDS if isinstance(network, kind)), None)
    if kind is None or network is None or vae is None:
        raise _unsupported(
            pipeline,
            "A U-Net of Stable Diffusion 1, 2 or XL, or a transformer of PixArt or Stable "
            "Diffusion 3, and an autoencoder are needed",
        )
    config: Any = network.config
    if not any(key in name for name, _ in network.named_parameters() for key in (".attn2.", ".add_k_proj.")):
        raise _unsupported(pipeline, "Its network has no cross-attention, so it cannot read captions")
    if config.in_channels != vae.config.latent_channels:
        raise _unsupported(
            pipeline,
            f"Its network takes {config.in_channels} channels and its autoencoder gives {vae.config.latent_channels}: "
            "pipelines that edit or fill in images are no text-to-image models",
        )
    text = _prompt_encoder(pipeline, network, 2 ** (len(vae.config.block_out_channels) - 1))
    return DiffusionModel(freeze(network), noise_schedule_of(parts["scheduler"]), LatentEncoder(vae, text))


def _network(pipeline: DiffusionPipeline) -> Any:
    """The part that denoises."""
    parts = pipeline.components
    return parts["unet"] if parts.get("unet") is not None else parts.get("transformer")


def _prompt_encoder(pipeline: DiffusionPipeline, network: Any, reduction: int) -> CaptionEncoder:
    """What turns captions into what the network is told."""
    config: Any = network.config
    size = (int(config.sample_size) * reduction,) * 2  # until the images' own is known
    if isinstance(network, SD3Transformer2DModel):
        suffixes = ["", "_2"] if pipeline.components.get("text_encoder_3") is None else ["", "_2", "_3"]
        models, tokenizers = _text_parts(pipeline, suffixes)
        lengths = [token_limit(*pair) for pair in zip(models[:2], tokenizers[:2], strict=True)]
        lengths += [min(_T5_TOKENS, token_limit(*pair)) for pair in zip(models[2:], tokenizers[2:], strict=True)]
        return SD3Prompts(models, tokenizers, lengths, config.joint_attention_dim, _T5_TOKENS)
    if isinstance(network, PixArtTransformer2DModel):
        models, tokenizers = _text_parts(pipeline, [""])
        most = _SIGMA_TOKENS if isinstance(pipeline, PixArtSigmaPipeline) else _ALPHA_TOKENS
        return PixArtPrompts(
            models,
            tokenizers,
            [min(most, token_limit(models[0], tokenizers[0]))],
            size if network.use_additional_conditions else None,
        )
    if config.addition_embed_type == "text_time":
        models, tokenizers = _text_parts(pipeline, ["", "_2"])
        lengths = [token_limit(*pair) for pair in zip(models, tokenizers, strict=True)]
        zero = bool(getattr(pipeline.config, "force_zeros_for_empty_prompt", True))
        return SDXLPrompts(models, tokenizers, lengths, size, zero)
    (model,), (tokenizer,) = _text_parts(pipeline, [""])
    return CaptionEncoder(model, tokenizer, token_limit(model, tokenizer))


def _text_parts(pipeline: DiffusionPipeline, suffixes: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Text encoders and tokenizers of a pipeline, none of which may be missing."""
    names = [f"{part}{suffix}" for suffix in suffixes for part in ("text_encoder", "tokenizer")]
    missing = [name for name in names if pipeline.components.get(name) is None]
    if missing:
        raise _unsupported(pipeline, f"It is missing its {' and '.join(missing)}")
    result = [pipeline.components[name] for name in names]
    return result[::2], result[1::2]


def _unsupported(pipeline: DiffusionPipeline, why: str) -> ValueError:
    there = ", ".join(name for name, part in pipeline.components.items() if part is not None)
    return ValueError(f"{type(pipeline).__name__} is not supported: {why}; it has {there}.")


def token_limit(text: Any, tokenizer: Any) -> int:
    """Tokens of a caption: as the tokenizer says, but no more than the text encoder has positions for."""
    limit = int(tokenizer.model_max_length)  # a huge number where the tokenizer's files do not say
    return min(limit, int(getattr(text.config, "max_position_embeddings", limit)))


def load_model(path: str, dtype: torch.dtype = torch.float32) -> DiffusionModel:
    """`model_from_pipeline` of `load_pipeline`; of a customized model's folder, with what it changes of its base.

    Raises:
        FileNotFoundError: A customized model's folder lacks a file.
        ImportError: There is an adapter, but peft is not installed.
        OSError: There is no pipeline at that path.
        ValueError: The path is neither a folder nor a hub id, the pipeline is of a kind that is not supported, or a
            customized model does not belong to its base.
    """
    base = base_of(Path(path))
    if base is not None:
        return load_customized(base, path, dtype)
    return model_from_pipeline(load_pipeline(path, dtype))


def load_customized(base: str, folder: str | Path, dtype: torch.dtype = torch.float32) -> DiffusionModel:
    """The base model with the weights and new words of a customized one; see `wherefrom.models.customization`.

    Args:
        base: Path or hub id of the base model.
        folder: Holds the weights and the new words, in the papers' layout or in diffusers'.
        dtype: Type of number.

    Raises:
        FileNotFoundError: There is no such folder.
        OSError: There is no base model.
        ValueError: One of weights and words is missing or damaged, or does not belong to the base.
    """
    customization = read_customization(folder)  # before the base, which may be large
    return customize(load_model(base, dtype), customization)


def encoder_of_pipeline(path: str) -> LatentEncoder:
    """Autoencoder and text encoder of a pipeline, for data modules that name it in YAML.

    Raises:
        OSError: There is no pipeline at that path.
        ValueError: The path is neither a folder nor a hub id, or the pipeline is of a kind that is not supported.
    """
    encoder = load_model(path).encoder
    assert encoder is not None
    return encoder
