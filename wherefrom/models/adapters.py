"""Adapters (LoRA and its kin): all of a file's tensors arrive in the model, or the adapter is refused.

A file is read in whatever layout its trainer wrote (`adapter_files`), its layers are found in the network and the text
encoders (`layer_names`), and every tensor is counted before anything changes. What can be kept apart from the model's
own weights becomes peft's layers; DoRA and whole differences are added to these weights: such an adapter is *fused*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wherefrom.models.adapter_files import (
    AdapterFile,
    FileLayer,
    is_adapter,
    is_checkpoint,
    keys_of,
    read_adapter,
)
from wherefrom.models.adapter_install import arrived, base_layer, merge, wrap
from wherefrom.models.adapter_match import NETWORK, TEXTS, Component, Fit, match, refusal
from wherefrom.models.adapter_sources import LORA, AdapterSource, file_of, files_beside, local_files
from wherefrom.models.adapter_states import (
    AdapterRecord,
    adapter_layers,
    adapters_in,
    check_adapters,
    known_adapters,
    note_adapter,
)
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.families.base import PipelineParts
from wherefrom.models.prompt_encoders import PromptEncoder
from wherefrom.models.textual_inversions import is_textual_inversion
from wherefrom.runtime.optional_dependencies import require_peft


def network_parts(model: DiffusionModel) -> dict[str, nn.Module]:
    """The parts of a model that adapters change: `network`, `text_encoder` and so on."""
    parts: dict[str, nn.Module] = {NETWORK: model.denoiser}
    if model.encoder is not None:
        text = model.encoder.text
        models = text.models if isinstance(text, PromptEncoder) else [text.model]
        parts |= dict(zip(TEXTS, models, strict=False))
    return parts


def pipeline_parts(parts: PipelineParts) -> dict[str, nn.Module]:
    """The parts of a pipeline that adapters change: `network`, `text_encoder` and so on."""
    found = {NETWORK: parts.network, **{name: parts.components.get(name) for name in TEXTS}}
    return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


def _free_name(model: nn.Module) -> str:
    """A name for an adapter, as diffusers chooses it."""
    taken = {name for _, layer in adapter_layers(model) for name in adapters_in(layer)}
    return next(name for name in (f"default_{n}" for n in range(len(taken) + 1)) if name not in taken)


def add_adapter(parts: Mapping[str, nn.Module], file: AdapterFile, weight: float = 1.0) -> AdapterRecord:
    """Adds an adapter to a model's parts, in place, frozen.

    Args:
        parts: See `network_parts` and `pipeline_parts`.
        file: The adapter.
        weight: How strongly it counts; negative turns it round.

    Raises:
        ImportError: peft is not installed.
        ValueError: A tensor of the file has no place in the model, or what it would do there is not clear.
    """
    components = {name: Component(part, name != NETWORK) for name, part in parts.items()}
    fit = match(file, components)
    if fit.others or not fit.changes:
        raise refusal(file, fit)
    _check_normed(file, fit, components, weight)
    unsound = [key for layer in file.layers.values() for key in layer.keys.values() if not _finite(layer, key)]
    if unsound:
        raise ValueError(f"{file.path}: {unsound[0]!r} holds numbers that are not finite; the file is damaged.")
    names = {owner: _free_name(parts[owner]) for owner in dict.fromkeys(owner for owner, _ in fit.changes)}
    configs: dict[str, Any] = {}
    for owner, change in fit.changes:
        if change.apart:
            configs.setdefault(owner, wrap(parts[owner], change, names[owner], weight))
            if not arrived(parts[owner], change, names[owner], weight):
                raise RuntimeError(f"{file.path}: the layer {change.module} did not take the adapter over.")
        else:
            merge(parts[owner], change, weight)
    for owner, config in configs.items():
        _register(parts[owner], names[owner], config)
    network = [change for owner, change in fit.changes if owner == NETWORK]
    fused = any(not change.apart for change in (network or [change for _, change in fit.changes]))
    layers = names.get(NETWORK, "") if NETWORK in configs else ""
    record = AdapterRecord(file.path.name, file.digest, weight, fused, bool(network), layers)
    note_adapter(parts[NETWORK], record)
    return record


def _check_normed(file: AdapterFile, fit: Fit, components: Mapping[str, Component], weight: float) -> None:
    """Refuses a DoRA whose effect depends on who applies it."""
    normed = [(owner, change) for owner, change in fit.changes if change.magnitude is not None]
    if normed and weight != 1:
        raise ValueError(
            f"lora: {file.path} is a DoRA, which has no weight but 1: programs disagree on what {weight:g} would do to "
            "its norm. Give it without a weight."
        )
    for owner, change in normed:
        if base_layer(layer := components[owner].model.get_submodule(change.module)) is not layer:
            raise ValueError(
                f"lora: {file.path} is a DoRA, whose norm at {change.module} depends on the adapter that is there "
                "already. Give the DoRA before the other."
            )


def _finite(layer: FileLayer, key: str) -> bool:
    part = next(part for part, each in layer.keys.items() if each == key)
    return bool(torch.isfinite(layer.parts[part].float()).all())


def _register(model: nn.Module, name: str, config: Any) -> None:
    """Tells diffusers and transformers that a model has an adapter, for `set_adapters` and its like."""
    part: Any = model
    if not hasattr(part, "peft_config"):
        part.peft_config = {}
    part.peft_config[name] = config
    if hasattr(part, "_hf_peft_config_loaded"):
        part._hf_peft_config_loaded = True


def note_fused(parts: PipelineParts) -> None:
    """Notes with a pipeline's network the adapters that were fused and whose layers are gone.

    Raises:
        ValueError: The adapters of a part are in a state that is not clear; see `check_adapters`.
    """
    for part in pipeline_parts(parts).values():
        check_adapters(part)
    network = parts.network
    known = {each.name for each in known_adapters(network)}
    for name in sorted(getattr(parts.pipeline, "fused_loras", ())):
        if name not in known and not any(name in adapters_in(layer) for _, layer in adapter_layers(network)):
            note_adapter(network, AdapterRecord(name, "", fused=True))


def adapters_beside(
    folder: Path, asked: Sequence[AdapterSource] = (), whole: bool = True
) -> tuple[list[AdapterFile], list[str]]:
    """The adapter at the top of a pipeline's folder, before the pipeline is loaded, and what is to be said of others.

    Args:
        folder: The folder.
        asked: Adapters that are loaded anyway.
        whole: Look at all files, and not only for the usual name: for a user's folder, not a copy of the hub's.

    Raises:
        ImportError: There is an adapter, but peft is not installed.
        ValueError: Which file is the model's adapter cannot be told, or it is a pickle or damaged.
    """
    named = [path for each in asked for path in local_files(each)]
    found, checkpoints = [], []
    for path in files_beside(folder, named):
        if not whole and path.name != LORA:
            continue
        if path.name == LORA:
            require_peft(f"The adapter {path}")
        keys = keys_of(path)
        if path.name == LORA or is_adapter(keys):
            found.append(path)
        elif is_checkpoint(keys):
            checkpoints.append(path)
        elif not is_textual_inversion(path):
            raise ValueError(
                f"{path} lies beside a pipeline, and what it is cannot be told: its tensors are called "
                f"{', '.join(repr(key) for key in keys[:2])}. Move it out of the folder if it is no part of the model."
            )
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds several adapters beside the pipeline ({', '.join(path.name for path in found)}): which of "
            "them belong to the model? Name these with the option 'lora', each with its weight; move the others."
        )
    if found and not (folder / "model_index.json").is_file() and not any(folder.glob("*/config.json")):
        raise ValueError(
            f"{folder} holds an adapter ({found[0].name}) and no pipeline: give the base that it was trained for as "
            "the model, and this folder with the option 'lora'."
        )
    if found and checkpoints and found[0].name != LORA:
        raise ValueError(
            f"{found[0]} lies beside a pipeline and {checkpoints[0].name}, as in a copy of a whole repository: does it "
            "belong to the model? Name it with the option 'lora' if it does, or move it away."
        )
    if found:
        require_peft(f"The adapter {found[0]}")
    notes = [f"{path.name} beside the pipeline is a whole model, which is not used." for path in checkpoints]
    return [read_adapter(path) for path in found], notes


def read_adapters(asked: Sequence[AdapterSource]) -> list[tuple[AdapterFile, float]]:
    """The files of the adapters that are asked for, and their weights.

    Raises:
        ImportError: peft is not installed.
        ValueError: One cannot be found or read, or is given twice.
    """
    if asked:
        require_peft("An adapter")
    files = [(read_adapter(file_of(each)), each.weight) for each in asked]
    digests = [file.digest for file, _ in files]
    for file, _ in files:
        if digests.count(file.digest) > 1:
            raise ValueError(
                f"lora: {file.path} is given twice; give it once, with the weight that both have together."
            )
    return files


def add_adapters(model: DiffusionModel, files: Sequence[tuple[AdapterFile, float]]) -> None:
    """Adds adapters to a model, in place, in their order.

    Args:
        model: The model.
        files: See `read_adapters`.

    Raises:
        ValueError: One does not fit the model.
    """
    there = {each.digest for each in known_adapters(model.denoiser)}
    for file, weight in files:
        if file.digest in there:
            raise ValueError(
                f"lora: {file.path} is in the model already, as the same file beside the pipeline; leave it out."
            )
        record = add_adapter(network_parts(model), file, weight)
        model.notes = (*model.notes, *fused_notes([record]))


def fused_notes(records: Iterable[AdapterRecord]) -> list[str]:
    """What a page says of adapters that cannot be told apart from the model."""
    return [
        f"The adapter {each} is fused: added to the model's own weights, from which it cannot be told apart."
        for each in records
        if each.fused
    ]
