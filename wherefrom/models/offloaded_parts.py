"""Replaced forwards that only move a part between devices, which changes nothing that it computes."""

from __future__ import annotations

from typing import Any

from torch import nn

# accelerate's hooks and diffusers' that bring weights to a device for a pass and take them away again, by class.
_MOVES = {
    ("accelerate.hooks", "AlignDevicesHook"),
    ("accelerate.hooks", "CpuOffload"),
    ("diffusers.hooks.group_offloading", "GroupOffloadingHook"),
    ("diffusers.hooks.group_offloading", "LazyPrefetchGroupOffloadingHook"),
}


def _names(hook: object) -> tuple[str, str]:
    return type(hook).__module__, type(hook).__name__


def offloading_hooks(module: nn.Module) -> list[object]:
    """What accelerate and diffusers have put around a module's forward, in the order in which it was put there."""
    hook: Any = module.__dict__.get("_hf_hook")
    several = [] if hook is None else list(hook.hooks) if _names(hook)[1] == "SequentialHook" else [hook]
    registry: Any = module.__dict__.get("_diffusers_hook")
    return several + ([] if registry is None else list(registry.hooks.values()))


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's forward was replaced, and by nothing but what moves it between devices."""
    hooks = offloading_hooks(module)
    return bool(hooks) and all(_names(hook) in _MOVES for hook in hooks)
