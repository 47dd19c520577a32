"""Which weights unlearning moves (AbU, section 3 and appendix C.2), and moving them in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from wherefrom.models.adapter_states import active_in, adapter_layers, adapter_weights, fused_adapters, wrong_gradients
from wherefrom.models.adapter_states import adapter_scales as adapter_scales
from wherefrom.models.families.registry import family_class_of
from wherefrom.models.families.stable_diffusion import StableDiffusion

Subset = Literal["cross_attention_kv", "cross_attention", "attention", "all", "adapter"]


def select_weights(denoiser: nn.Module, subset: Subset) -> dict[str, nn.Parameter]:
    """The parameters of a subset by name, in the model's order.

    A layer that an adapter wraps (LoRA and its kin, by peft) counts with its own weight and the adapter's; `adapter`
    takes the adapters' weights alone, wherever they are: those that were trained. Weights of adapters that are
    disabled, inactive, fused or at weight zero take no part in the model's output, and belong to no subset.

    Raises:
        ValueError: The subset is unknown, the model has no such weights, an adapter is fused, so that it cannot be told
            apart, or is of a kind whose gradients peft does not take.
    """
    if subset not in get_args(Subset):
        raise ValueError(f"Unknown weights {subset!r}; choose from {', '.join(get_args(Subset))}.")
    belongs = (family_class_of(denoiser) or StableDiffusion).subsets[subset]
    counting = adapter_weights(denoiser)
    if subset == "adapter":
        _check_apart(denoiser, counting)
    chosen = {
        name: parameter
        for name, parameter in denoiser.named_parameters()
        if (belongs(f".{name}") or (subset == "adapter" and name in counting)) and counting.get(name, True)
    }
    if not chosen:
        raise ValueError(f"{type(denoiser).__name__} has no weights of the subset {subset!r}; 'all' always has some.")
    _check_gradients(denoiser, chosen)
    return chosen


def _check_apart(denoiser: nn.Module, counting: Mapping[str, bool]) -> None:
    """Refuses the subset of adapters' weights where it would not be all of them, or none."""
    fused = fused_adapters(denoiser)
    if fused:
        raise ValueError(
            f"The adapter {fused[0]} is fused: added to the weights of {type(denoiser).__name__}, from which it cannot "
            "be told apart. Choose other weights than adapter, such as cross_attention_kv; they hold both."
        )
    if counting and not any(counting.values()):
        raise ValueError(
            f"The adapters of {type(denoiser).__name__} are disabled, inactive or at weight zero, so none of their "
            "weights takes part. Choose other weights than adapter, or set the adapters before."
        )


def _check_gradients(denoiser: nn.Module, chosen: Mapping[str, nn.Parameter]) -> None:
    """Refuses weights whose gradients by peft are not those of the output."""
    for layer_name, layer in adapter_layers(denoiser):
        for each in active_in(layer):
            why = wrong_gradients(layer, each)
            if why and any(name.startswith(f"{layer_name}.") for name in chosen):
                raise ValueError(
                    f"{layer_name} has the adapter {each} ({why}), so that its gradients are not those of the model. "
                    "Fuse it before, with fuse_lora() of the pipeline."
                )


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
