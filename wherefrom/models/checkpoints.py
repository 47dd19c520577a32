"""Folders that hold a part of a pipeline: what a trainer leaves behind, which its base pipeline completes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from torch import nn

from wherefrom.models.families.base import PipelineParts
from wherefrom.models.loaded_parts import INDEX, check_finite, load_part

_PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_AVERAGED = "_ema"
# What diffusers' EMAModel writes into a network's settings about its averaging.
_AVERAGING = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
_STATE = ("model.safetensors", "pytorch_model.bin")
_ADAPTER = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
# Settings of a network that say which text encoders and autoencoder it was trained with.
_AGREE = (
    "in_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "caption_channels",
)


def partial_parts(folder: Path) -> dict[str, Path] | None:
    """The parts that a trainer's checkpoint holds: name -> folder, or the file of the network's weights alone.

    Args:
        folder: Any folder.

    Returns:
        None where the folder is no such checkpoint: a whole pipeline, or something else altogether.

    Raises:
        ValueError: It is an adapter, or says of two networks not which is meant.
    """
    if not folder.is_dir() or (folder / INDEX).is_file():
        return None
    kind = _class_name(folder)
    if kind:
        name = next((each for end, each in _KINDS.items() if end in kind), None)
        return None if name is None else {name: folder}
    parts = {name: folder / name for name in _PARTS if _class_name(folder / name)}
    for name in ("unet", "transformer"):
        averaged = folder / f"{name}{_AVERAGED}"
        if not _class_name(averaged):
            continue
        if name in parts:
            raise ValueError(
                f"model: {folder} holds two networks, {name} and its running average {averaged.name}: give the folder "
                "of the one that drew the images as the model."
            )
        parts[name] = averaged
    if not parts:
        adapter = next((folder / name for name in _ADAPTER if (folder / name).is_file()), None)
        if adapter is not None:
            raise ValueError(
                f"model: {folder} holds an adapter (LoRA) and no model: give its base as the model, and {adapter} as "
                "the option 'lora'."
            )
        state = next((folder / name for name in _STATE if (folder / name).is_file()), None)
        if state is not None and not (folder / "config.json").is_file():
            parts = {"network": state}
    return parts or None


_KINDS = {"UNet": "unet", "Transformer": "transformer", "Autoencoder": "vae"}


def _class_name(folder: Path) -> str:
    """The class of the part in a folder, by its `config.json`; empty where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return ""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    architectures = config.get("architectures") or [""]
    return str(config.get("_class_name") or architectures[0])


def without_base(folder: Path, parts: dict[str, Path]) -> ValueError:
    """The error that a part of a pipeline was given without the rest."""
    whole = next((place for place in list(folder.resolve().parents)[:2] if (place / INDEX).is_file()), None)
    what = " and ".join(_held(name, place) for name, place in parts.items())
    if whole is not None and folder.resolve().parent == whole:
        return ValueError(f"model: {folder} holds {what} of the pipeline {whole}: give that folder as the model.")
    return ValueError(
        f"model: {folder} holds {what} and no whole pipeline: name the pipeline that it was trained from as the option "
        "'base', whose other parts are taken."
    )


def _held(name: str, place: Path) -> str:
    return f"weights ({place.name})" if name == "network" else f"a {name}"


def complete(base: DiffusionPipeline, parts: dict[str, Path], dtype: torch.dtype) -> list[str]:
    """Puts a checkpoint's parts in the place of the base's.

    Args:
        base: The pipeline that the checkpoint was trained from; changed in place.
        parts: See `partial_parts`.
        dtype: Type of number.

    Returns:
        What is to be said of it.

    Raises:
        ValueError: A part is not of the base's kind, or a tensor is missing or damaged.
    """
    there = PipelineParts(base)
    notes = []
    for name, place in parts.items():
        old: Any = there.network if name == "network" else there.components.get(name)
        if old is None:
            raise ValueError(f"model: {place} is a {name}, which the base does not have: it is another model's.")
        if name == "network":
            _take(old, place, dtype)
            continue
        kind = _class_name(place)
        if kind != type(old).__name__:
            raise ValueError(
                f"model: {place} is a {kind}, and the base's {name} a {type(old).__name__}: it was trained from "
                "another pipeline."
            )
        loaded, said = load_part(place, type(old), dtype)
        new: Any = loaded
        _check_same_base(new, old, place)
        if hasattr(new, "_internal_dict"):
            settings = {key: value for key, value in dict(new.config).items() if key not in _AVERAGING}
            vars(new)["_internal_dict"] = FrozenDict(settings)
        base.register_modules(**{name: new})
        notes += said
    kept = [name for name, part in there.components.items() if name in _PARTS and name not in parts and part]
    if "network" in parts:
        kept = [name for name in kept if there.components[name] is not there.network]
    return [*notes, f"Of the base are {', '.join(kept)} and the noise schedule."]


def _check_same_base(new: Any, old: Any, place: Path) -> None:
    for name in _AGREE:
        given, expected = getattr(new.config, name, None), getattr(old.config, name, None)
        if given != expected:
            raise ValueError(
                f"model: {place} has {name} {given}, the base {expected}: it was trained from another pipeline."
            )


def _take(network: nn.Module, file: Path, dtype: torch.dtype) -> None:
    """Fills a network with the weights that `accelerate` saved, by the network's own names.

    Raises:
        ValueError: They are another network's.
    """
    from diffusers.models.model_loading_utils import load_state_dict  # never unpickles

    try:
        tensors: dict[str, Any] = dict(load_state_dict(str(file)))
    except Exception as error:
        raise ValueError(f"model: {file} cannot be read as tensors: {' '.join(str(error).split())[:200]}") from error
    expected = network.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        side = "lacks" if name in expected else "holds besides"
        raise ValueError(f"model: {file} {side} the tensor {name} of the base's network: it is another network's.")
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"model: {file}: the tensor {name} has shape {tuple(value.shape)}, the base's "
                f"{tuple(expected[name].shape)}."
            )
    network.load_state_dict({name: value.to(dtype) for name, value in tensors.items()})
    check_finite(network, str(file))
