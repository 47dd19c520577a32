"""Models as diffusers pipeline folders: what we train is saved as one, and any Stable-Diffusion-like one is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import AutoModel

from wherefrom.models.adapter_sources import LORA as LORA
from wherefrom.models.adapter_sources import AdapterInput, AdapterSource, parse_adapter
from wherefrom.models.adapter_states import known_adapters
from wherefrom.models.adapters import (
    adapters_beside,
    add_adapter,
    add_adapters,
    fused_notes,
    note_fused,
    pipeline_parts,
    read_adapters,
)
from wherefrom.models.allowed_parts import check_components, check_pipeline
from wherefrom.models.autoencoders import autoencoder_fault
from wherefrom.models.checkpoints import complete, partial_parts, without_base
from wherefrom.models.customization import base_of, customize, is_customized, read_customization
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.encoders import LatentEncoder, freeze
from wherefrom.models.families.base import PipelineParts
from wherefrom.models.families.registry import families, family_class_of, family_of
from wherefrom.models.loaded_parts import INDEX, check_loaded, load_part, load_parts, local_folder, read_index
from wherefrom.models.noise_schedule import pipeline_scheduler
from wherefrom.models.package_paths import resolve_path
from wherefrom.models.plain_parts import plain_parts
from wherefrom.models.prompt_encoders import PromptEncoder
from wherefrom.models.single_file import load_single_file
from wherefrom.models.step_distilled import distilled_notes, is_noted
from wherefrom.models.textual_inversions import load_inversions
from wherefrom.runtime.artifacts import write_json

TEXT_SOURCE = "text_encoder/source.json"


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
    family = family_class_of(denoiser)
    saved = None if family is None else family.saved_as
    several = isinstance(model.encoder.text, PromptEncoder) and len(model.encoder.text.models) > 1
    if saved is None or several:
        raise ValueError(
            f"{type(denoiser).__name__} cannot be saved: only models of one text encoder can, U-Nets as in Stable "
            "Diffusion 1 and 2 and transformers of PixArt. Save the pipeline that it came from with diffusers."
        )
    name = saved.network
    folder.mkdir(parents=True, exist_ok=True)
    for part_name, part in ((name, denoiser), ("vae", model.encoder.vae)):
        rounded = type(part).from_config(part.config)
        rounded.load_state_dict(part.state_dict())
        rounded.to(dtype).save_pretrained(folder / part_name)
    scheduler = pipeline_scheduler(model.noise_schedule)
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
            "_class_name": saved.pipeline,
            "_diffusers_version": diffusers.__version__,
            **saved.others,
            "scheduler": ["diffusers", type(scheduler).__name__],
            "text_encoder": ["transformers", type(text_model).__name__],
            "tokenizer": ["transformers", type(tokenizer).__name__],
            name: ["diffusers", type(denoiser).__name__],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def load_pipeline(path: str, dtype: torch.dtype = torch.float32, base: str | None = None) -> DiffusionPipeline:
    """Loads a diffusers pipeline from a folder, a hub id, or a single file in the original names.

    Where a folder holds an adapter, such as `pytorch_lora_weights.safetensors`, which diffusers' training scripts and
    `save_lora_weights` write, it is loaded too, and so are textual
    inversions; see `wherefrom.models.adapters` and `wherefrom.models.textual_inversions`.

    Args:
        path: The folder, hub id or file.
        dtype: Type of number.
        base: The pipeline from which comes what a trainer's checkpoint or a single file lacks.

    Raises:
        ImportError: There is an adapter, but peft is not installed.
        OSError: There is no pipeline at that path.
        ValueError: The path is neither a folder nor a hub id, a tensor is missing or damaged, a base is missing or of
            no use, or not all of an adapter has a place in the model.
    """
    return _read_pipeline(path, dtype, base=base)[0]


def _read_pipeline(
    path: str, dtype: torch.dtype, lora: Sequence[AdapterSource] = (), base: str | None = None
) -> tuple[DiffusionPipeline, list[str]]:
    """A pipeline, and what is to be said of how it was loaded.

    Args:
        path: Folder, hub id, or single file.
        dtype: Type of number.
        lora: Adapters that are added afterwards, so that they do not also count as lying beside the pipeline.
        base: See `load_pipeline`.
    """
    place = Path(path)
    parts = partial_parts(place)
    if not place.is_file() and parts is None:
        if base is not None:
            raise ValueError(
                f"model: {path} is a whole pipeline, of which nothing comes from a base: leave out the option 'base'."
            )
        return _read_whole(path, dtype, lora)
    if parts is not None and base is None:
        raise without_base(place, parts)
    below, notes = (None, []) if base is None else _read_pipeline(base, dtype, lora)
    adapters = [] if below is None else [each.name for each in known_adapters(PipelineParts(below).network)]
    if adapters:
        raise ValueError(
            f"model: the base {base} comes with adapters ({', '.join(adapters)}), which its part in {path} may have or "
            "not: give a base without them, and name those that belong to the model as the option 'lora'."
        )
    if parts is None:
        pipeline, more = load_single_file(place, dtype, below)
        return pipeline, [*notes, *more]
    assert below is not None
    return below, [*notes, *complete(below, parts, dtype)]


def _read_whole(path: str, dtype: torch.dtype, lora: Sequence[AdapterSource]) -> tuple[DiffusionPipeline, list[str]]:
    folder = local_folder(path)
    source, (beside, notes) = folder / TEXT_SOURCE, adapters_beside(folder, lora, whole=Path(path).is_dir())
    parts: dict[str, Any] = {}
    if source.is_file():
        parts["text_encoder"] = _text_encoder(json.loads(source.read_text())["path"]).to(dtype)
    if (folder / INDEX).is_file():
        # A text encoder that was left out must be named, or the pipeline takes it for a damaged one.
        absent = [name for name, kind in read_index(folder).items() if kind == [None, None]]
        parts |= dict.fromkeys(name for name in absent if name.startswith(("text_encoder", "tokenizer")))
        loaded, more = load_parts(folder, dtype, parts)
        notes += more
        parts |= loaded
    pipeline = DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, low_cpu_mem_usage=False, **parts)
    network = PipelineParts(pipeline).network
    for adapter in beside:
        add_adapter(pipeline_parts(PipelineParts(pipeline)), adapter)
    if isinstance(network, nn.Module):
        network.to(dtype)  # some transformers stay in single precision whatever is asked for
    if Path(path).is_dir():
        load_inversions(pipeline, Path(path))
    return pipeline, notes


def _text_encoder(path: str) -> nn.Module:
    """A text encoder from a folder, `package:NAME/FOLDER`, a hub id, or a folder of a hub id (`OWNER/NAME/FOLDER`)."""
    resolved = resolve_path(path)
    parts = resolved.split("/")
    if Path(resolved).is_dir():
        return load_part(Path(resolved), AutoModel)[0]
    subfolder = {"subfolder": "/".join(parts[2:])} if len(parts) > 2 and parts[0] else {}
    name = "/".join(parts[:2]) if subfolder else resolved
    text, info = AutoModel.from_pretrained(name, output_loading_info=True, **subfolder)
    check_loaded(text, info, Path(path))
    result: nn.Module = text
    return result


def model_from_pipeline(pipeline: DiffusionPipeline) -> DiffusionModel:
    """The parts of a loaded pipeline as a `DiffusionModel`, frozen and in evaluation mode.

    The pipeline is left as it is; the model has copies of its parts, which share their weights with it where these are
    in float32.

    Raises:
        ValueError: The pipeline's network is of a kind that is not supported, cannot read captions or takes more than
            noisy latents; a part is missing; or one computes what its weights do not say.
    """
    parts = PipelineParts(pipeline)
    check_components(parts.components)
    parts.components, notes = plain_parts(parts.components)
    parts.components |= {name: copy.deepcopy(part) for name, part in parts.components.items() if "tokenizer" in name}
    network, vae = parts.network, parts.components.get("vae")
    if family_class_of(network) is None or vae is None:
        *first, last = [family.description for family in families()]
        needed = f"{', '.join(first)} or {last}"
        raise parts.unsupported(f"{needed[0].upper()}{needed[1:]}, and an autoencoder are needed")
    family = family_of(network)
    config: Any = network.config
    if not any(family.subsets["cross_attention_kv"](f".{name}") for name, _ in network.named_parameters()):
        raise parts.unsupported("Its network has no cross-attention, so it cannot read captions")
    fault = autoencoder_fault(vae)
    if fault is not None:
        raise parts.unsupported(fault)
    if config.in_channels != vae.config.latent_channels:
        raise parts.unsupported(
            f"Its network takes {config.in_channels} channels and its autoencoder gives {vae.config.latent_channels}: "
            "pipelines that edit or fill in images are no text-to-image models"
        )
    note_fused(parts)
    check_pipeline(parts, family)
    encoder = family.latent_encoder(parts)
    model = DiffusionModel(freeze(network), family.noise_schedule(parts.components["scheduler"]), encoder)
    adapters = known_adapters(network)
    places = [str(getattr(config, "_name_or_path", "")), *(adapter.name for adapter in adapters)]
    distilled = distilled_notes(places, parts.components["scheduler"])
    model.notes = (*notes, *fused_notes(adapters), *distilled)
    return model


def load_model(
    path: str, dtype: torch.dtype = torch.float32, lora: Sequence[AdapterInput] = (), base: str | None = None
) -> DiffusionModel:
    """`model_from_pipeline` of `load_pipeline`; of a customized model's folder, with what it changes of its base.

    Args:
        path: Folder, hub id, or single file.
        dtype: Type of number.
        lora: Adapters that are added to it: files, folders or hub ids; see `parse_adapter`.
        base: See `load_pipeline`; or the base of a customized model, whose folder may name it too.

    Raises:
        FileNotFoundError: A customized model's folder lacks a file.
        ImportError: There is an adapter, but peft is not installed.
        OSError: There is no pipeline at that path.
        ValueError: The path is neither a folder nor a hub id, the pipeline is of a kind that is not supported, a
            customized model does not belong to its base, or an adapter cannot be found or does not fit.
    """
    asked = [parse_adapter(each) for each in lora]
    files = read_adapters(asked)  # before the pipeline, which may be large
    named = base_of(Path(path))
    if named is not None or (base is not None and is_customized(Path(path))):
        model = load_customized(base or str(named), path, dtype)
    else:
        pipeline, notes = _read_pipeline(path, dtype, asked, base)
        model = model_from_pipeline(pipeline)
        model.notes = (*notes, *model.notes)
    add_adapters(model, files)
    said = [] if is_noted(model.notes) else distilled_notes([path, *(each.place for each in asked)])
    model.notes = (*model.notes, *said)
    return model


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
    model = load_model(base, dtype)
    if known := known_adapters(model.denoiser):
        raise ValueError(
            f"The base {base} of {folder} has an adapter ({known[0].name}): whose weights were customized, its own or "
            "those with the adapter? Name a base without one, or one that it is merged into."
        )
    return customize(model, customization)


def encoder_of_pipeline(path: str) -> LatentEncoder:
    """Autoencoder and text encoder of a pipeline, for data modules that name it in YAML.

    Raises:
        OSError: There is no pipeline at that path.
        ValueError: The path is neither a folder nor a hub id, or the pipeline is of a kind that is not supported.
    """
    encoder = load_model(path).encoder
    assert encoder is not None
    return encoder
