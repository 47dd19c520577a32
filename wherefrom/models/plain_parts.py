"""Copies of a loaded pipeline's parts as attribution needs them, which leave the pipeline itself as it is.

A copy shares its weights with the user's part where they are in float32 already, and has a float32 copy of them where
they are narrower. What changes where or how a part is computed, but not what, is taken off the copy: compilation,
offloading, memory formats, layerwise casting, fused projections. Everything else stays on it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from wherefrom.models.loaded_parts import decides

_PLAIN = (torch.float32, torch.float64)
_NARROW = (
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
# accelerate's hooks that move tensors and compute nothing.
_MOVING = ("AlignDevicesHook", "CpuOffload", "SequentialHook", "LayerwiseCastingHook")
# diffusers' hooks that store weights in a narrower type and compute in a wider one.
_CASTING = ("layerwise_casting", "peft_autocast_disable")
# What accelerate puts in the way of moving a module by hand.
_GUARDS = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "hf_device_map")
# A fused projection -> the projections whose rows it holds, in their order.
_FUSED: Mapping[str, tuple[str, ...]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


class _Gone:
    """Stands for what is not copied."""


def plain_parts(components: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A pipeline's components with copies of those that a loss or an image is computed with.

    Args:
        components: The pipeline's; neither they nor their settings are changed.

    Returns:
        Components by name, and what is to be said of the copies.

    Raises:
        ValueError: A part is quantized, has a hook that is not understood, holds no values, or does not fit into
            memory in float32.
    """
    result = dict(components)
    precisions: dict[str, str] = {}
    for name, part in components.items():
        if decides(name) and isinstance(part, nn.Module):
            result[name], widened = plain_copy(part, name)
            if widened:
                precisions[name] = " and ".join(str(each).removeprefix("torch.") for each in widened)
    if not precisions:
        return result, []
    given = ", ".join(f"{name} is in {precision}" for name, precision in precisions.items())
    return result, [f"Attribution computes in float32 with a copy of the pipeline's weights ({given})."]


def plain_copy(part: nn.Module, name: str) -> tuple[nn.Module, list[torch.dtype]]:
    """A part without what only moves or speeds it up, in float32.

    Args:
        part: Is left as it is.
        name: What the pipeline calls it.

    Returns:
        The copy, in evaluation mode, and the narrower types of number that the weights had.

    Raises:
        ValueError: See `plain_parts`.
    """
    part = getattr(part, "_orig_mod", part)  # what torch.compile wraps
    _refuse_quantized(part, name)
    tensors = dict(_tensors(part, name))
    narrow = sorted({each.dtype for each, _ in tensors.values() if each.dtype in _NARROW}, key=str)
    _refuse_too_large(tensors, name)
    memo: dict[int, Any] = {key: _plain_tensor(*each) for key, each in tensors.items()}
    for module in part.modules():
        for hook in (getattr(module, "_hf_hook", None), getattr(module, "_diffusers_hook", None)):
            if hook is not None:
                memo[id(hook)] = _Gone()
    result: nn.Module = copy.deepcopy(part, memo)
    for module in list(result.modules()):
        _unhooked(module)
        for child_name, child in module.named_children():
            if hasattr(child, "_orig_mod"):  # compiled block by block
                setattr(module, child_name, child._orig_mod)
    _unfuse(result)
    if narrow:
        _renew_tables(result)
    return result.eval(), narrow


def _refuse_quantized(part: nn.Module, name: str) -> None:
    """Quantized layers compute something else than the weights that a gradient would be taken of.

    Raises:
        ValueError: The part or one of its tensors is quantized.
    """
    config: Any = getattr(part, "config", None)
    given = getattr(config, "quantization_config", None)
    if getattr(part, "hf_quantizer", None) is not None or given:
        method = getattr(given, "quant_method", None) or (given or {}).get("quant_method", "a quantizer")
        raise ValueError(f"{_quantized(name)} ({getattr(method, 'value', method)}). {_REMEDY}")
    for module_name, module in part.named_modules():
        for tensor_name, tensor in module._parameters.items():
            if tensor is None:
                continue
            if type(tensor) not in (nn.Parameter, Tensor) or not tensor.is_floating_point():
                where = f"{module_name}.{tensor_name}" if module_name else tensor_name
                kind = f"{type(tensor).__name__} in {type(module).__name__}, {tensor.dtype}"
                raise ValueError(f"{_quantized(name)} ({where} is a {kind}). {_REMEDY}")


_REMEDY = "Load the pipeline without quantization, in float32, bfloat16 or float16."


def _quantized(name: str) -> str:
    return f"The pipeline's {name} is quantized, which is not supported: its weights have no gradients of their own"


def _tensors(part: nn.Module, name: str) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Parameters and buffers by identity, with their values, which may be kept elsewhere.

    Raises:
        ValueError: A hook is not understood, a tensor has no values, or is of another type than floats and integers.
    """
    for module_name, module in part.named_modules():
        _check_hooks(module, f"{name}.{module_name}".rstrip("."))
        own = {**module._parameters, **module._buffers}
        for tensor_name, tensor in own.items():
            if tensor is None:
                continue
            value = _offloaded(module, tensor_name) if tensor.is_meta else tensor
            where = ".".join(each for each in (name, module_name, tensor_name) if each)
            if value is None or value.is_meta:
                raise ValueError(
                    f"The pipeline's {where} holds no values here (it is a meta tensor): call "
                    "pipeline.remove_all_hooks(), or load the pipeline without offloading."
                )
            if value.is_floating_point() and value.dtype not in (*_PLAIN, *_NARROW):
                raise ValueError(f"The pipeline's {where} is in {value.dtype}, which is not supported. {_REMEDY}")
            yield id(tensor), (value, tensor)


def _check_hooks(module: nn.Module, where: str) -> None:
    """Refuses hooks of accelerate and diffusers that do more than move or cast tensors.

    Raises:
        ValueError: There is one.
    """
    hook = getattr(module, "_hf_hook", None)
    for each in () if hook is None else (hook, *getattr(hook, "hooks", ())):
        if type(each).__name__ not in _MOVING:
            raise ValueError(
                f"The pipeline's {where} has accelerate's hook {type(each).__name__}, which is not understood: call "
                "pipeline.remove_all_hooks() first."
            )
    registry: Any = getattr(module, "_diffusers_hook", None)
    if registry is not None and registry._fn_refs:
        first = registry._fn_refs[0]
        before = first.original_forward or first.forward
        if getattr(before, "__func__", None) is not type(module).forward:
            raise ValueError(f"The pipeline's {where} has another forward than {type(module).__name__}'s own.")
    for each in () if registry is None else registry.hooks:
        if each not in _CASTING:
            raise ValueError(
                f"The pipeline's {where} has diffusers' hook {each!r}, which is not supported: load the pipeline "
                "without it."
            )


def _offloaded(module: nn.Module, name: str) -> Tensor | None:
    """A tensor's values where accelerate keeps them while they are not needed."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in () if hook is None else (hook, *getattr(hook, "hooks", ())):
        values = getattr(each, "weights_map", None)
        if values is not None:
            kept: Tensor = values[name]
            return kept
    return None


def _plain_tensor(value: Tensor, of: Tensor) -> Tensor:
    """The values as the copy holds them: shared where they are plain already."""
    tensor = value.detach()
    if tensor.dtype in _NARROW:
        tensor = tensor.to(torch.float32)
    if tensor.is_inference() or tensor.stride() != torch.empty(tensor.shape, device="meta").stride():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    if isinstance(of, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=of.requires_grad and tensor.is_floating_point())
    return tensor


def _refuse_too_large(tensors: Mapping[int, tuple[Tensor, Tensor]], name: str) -> None:
    """Refuses a copy in float32 for which there is no memory, before it is begun.

    Raises:
        ValueError: It does not fit.
    """
    needed: dict[torch.device, int] = {}
    for value, _ in tensors.values():
        if value.dtype in _NARROW:
            needed[value.device] = needed.get(value.device, 0) + 4 * value.numel()
    for device, size in needed.items():
        free = _free(device)
        if size > free:
            precision = next(value.dtype for value, _ in tensors.values() if value.dtype in _NARROW)
            raise ValueError(
                f"The pipeline's {name} is in {str(precision).removeprefix('torch.')}. Attribution needs a float32 "
                f"copy of it, as steps of unlearning are smaller than {precision} can hold: {size / 2**30:.1f} GiB, "
                f"and {free / 2**30:.1f} GiB are free on {device}. Move the pipeline to a device with more memory."
            )


def _free(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _unhooked(module: nn.Module) -> None:
    """Takes moving, casting and compiling off a module of the copy; its forward is its class's own again."""
    kept = module.__dict__
    hooked = isinstance(kept.get("_hf_hook"), _Gone) or isinstance(kept.get("_diffusers_hook"), _Gone)
    if not hooked:
        return
    for name in ("_hf_hook", "_diffusers_hook", *_GUARDS):
        kept.pop(name, None)
    before = kept.pop("_old_forward", None)
    own = before is None or getattr(before, "__func__", None) is type(module).forward
    kept.pop("forward", None)
    if not own:  # somebody else's, which was there before the hook
        kept["forward"] = before


@torch.no_grad()
def _unfuse(part: Any) -> None:
    """Gives fused projections of keys, values and queries back to the layers that they were made of."""
    fused = [module for module in part.modules() if getattr(module, "fused_projections", False) is True]
    for attention in fused:
        for joint_name, names in _FUSED.items():
            joint = attention._modules.get(joint_name)
            if joint is None:
                continue
            layers = [attention._modules[name] for name in names]
            rows = [layer.weight.shape[0] for layer in layers]
            biases = [None] * len(layers) if joint.bias is None else joint.bias.split(rows)
            for layer, weight, bias in zip(layers, joint.weight.split(rows), biases, strict=True):
                layer.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
                if bias is not None:
                    layer.bias = nn.Parameter(bias.clone(), requires_grad=layer.weight.requires_grad)
            del attention._modules[joint_name]
        attention.fused_projections = False
    if fused and getattr(part, "original_attn_processors", None) is not None:
        part.set_attn_processor(dict(part.original_attn_processors))
        part.original_attn_processors = None


def _renew_tables(part: Any) -> None:
    """Computes tables that no file holds anew: rounded ones, such as embeddings of positions, are another model's."""
    persistent = part.state_dict().keys()
    tables = {name: value for name, value in part.named_buffers() if name not in persistent}
    if not any(value.is_floating_point() for value in tables.values()):
        return
    config: Any = part.config
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        fresh = type(part).from_config(config) if hasattr(type(part), "from_config") else type(part)(config)
    for name, value in fresh.named_buffers():
        if name in tables and value.shape == tables[name].shape:
            owner, _, last = name.rpartition(".")
            part.get_submodule(owner)._buffers[last] = value.to(tables[name])
