"""Which weights unlearning moves (AbU, section 3 and appendix C.2), and moving them in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from wherefrom.models.families.registry import family_class_of
from wherefrom.models.families.stable_diffusion import StableDiffusion

Subset = Literal["cross_attention_kv", "cross_attention", "attention", "all", "adapter"]


def select_weights(denoiser: nn.Module, subset: Subset) -> dict[str, nn.Parameter]:
    """The parameters of a subset by name, in the model's order.

    A layer that an adapter wraps (LoRA, by peft) counts with its own weight and the adapter's; `adapter` takes the
    adapters' weights alone, wherever they are: those that were trained.

    Raises:
        ValueError: The subset is unknown, or the model has no such weights.
    """
    if subset not in get_args(Subset):
        raise ValueError(f"Unknown weights {subset!r}; choose from {', '.join(get_args(Subset))}.")
    belongs = (family_class_of(denoiser) or StableDiffusion).subsets[subset]
    chosen = {name: parameter for name, parameter in denoiser.named_parameters() if belongs(f".{name}")}
    if not chosen:
        raise ValueError(f"{type(denoiser).__name__} has no weights of the subset {subset!r}; 'all' always has some.")
    return chosen


def adapter_scales(denoiser: nn.Module) -> dict[str, float]:
    """How strongly each wrapped layer's adapters count, which no weight says."""
    scales: dict[str, float] = {}
    for name, module in denoiser.named_modules():
        if hasattr(module, "lora_A"):
            layer: Any = module
            active = () if layer.disable_adapters else layer.active_adapters
            scales |= {f"{name}.{each}": float(layer.scaling[each]) for each in active if each in layer.scaling}
    return scales


@torch.no_grad()
def copy_into(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies values into parameters in place, so that a compiled graph and its buffers stay valid.

    Raises:
        ValueError: A name is missing or a shape differs.
    """
    for name, value in values.items():
        if name not in parameters:
            raise ValueError(f"The model has no weight {name!r}.")
        if parameters[name].shape != value.shape:
            raise ValueError(f"Weight {name!r} has shape {tuple(parameters[name].shape)}, given {tuple(value.shape)}.")
        parameters[name].copy_(value)


@contextmanager
def restored(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Whatever happens to these parameters inside the block, their former values come back at its end."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        copy_into(parameters, before)


@contextmanager
def moved_weights(denoiser: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The denoiser with other values in some of its weights; the former values come back at the end."""
    parameters = {name: parameter for name, parameter in denoiser.named_parameters() if name in values}
    with restored(parameters):
        copy_into(parameters, values)
        yield


@contextmanager
def trainable(denoiser: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Only these parameters ask for gradients inside the block; each one's former flag comes back at the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in denoiser.parameters()]
    try:
        denoiser.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
