"""What code a part runs: hooks, replaced methods and patched classes of unknown origin are refused by name.

A loss measures what the weights compute. Notebooks, and packages that make sampling faster or its images richer, put
other code between weights and result (hooks, a `forward` of their own, a patched class), and no hash of the weights
shows it. So only code that comes from where the part's own class comes from may run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch.nn.functional
from torch import nn
from torch.nn.modules import module as all_modules

# Packages whose classes make up the parts of a pipeline, and those from which their methods' code may come.
_PACKAGES = frozenset({"torch", "diffusers", "transformers", "peft", "wherefrom"})
_CODE = _PACKAGES | {"accelerate", "huggingface_hub", "contextlib", "functools", "typing", "abc", "builtins"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
# Hooks that only watch: ours while gradients are taken, transformers' that collect hidden states, torch's counters.
_WATCHERS = ("wherefrom.", "transformers.utils.output_capturing", "torch.utils.")
_KEEPS_GRADIENTS = ("make_inputs_require_grads", "make_inputs_require_grad")
# Instance attributes that stand before a class's own and decide nothing: where a module goes, and checkpointing.
_HARMLESS = frozenset({"to", "cuda", "xpu", "npu", "mlu", "_gradient_checkpointing_func", "_compiled_call_impl"})


def _root(module: object) -> str:
    return str(module).partition(".")[0]


def code_place(code: Any) -> tuple[str, str]:
    """Module and name of what a callable runs, behind `partial` and bound methods; what it claims is not asked for."""
    while isinstance(code, partial | MethodType):
        code = code.func if isinstance(code, partial) else code.__func__
    if isinstance(code, FunctionType):
        return str(code.__globals__.get("__name__", "?")), code.__code__.co_qualname
    named = code if isinstance(code, type) or hasattr(code, "__qualname__") else type(code)
    return str(getattr(named, "__module__", None) or "builtins"), str(named.__qualname__)


def _said(code: Any) -> str:
    module, name = code_place(code)
    return f"{name!r} of {module}"


def _layers(code: Any) -> Iterator[FunctionType]:
    """A method's function and all that decorators have wrapped."""
    code = getattr(code, "__func__", code)
    code = code.fget if isinstance(code, property) else code
    while isinstance(code, FunctionType):
        yield code
        code = getattr(code, "__wrapped__", None)


def _foreign(code: Any, roots: frozenset[str]) -> FunctionType | None:
    """The first layer of a function that comes from another package."""
    return next((each for each in _layers(code) if _root(each.__globals__.get("__name__")) not in roots), None)


def _found(kind: type) -> object:
    """What a class's module holds under its name."""
    place: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        place = getattr(place, name, None)
    return place


def _check_class(kind: type[nn.Module], where: str, own: str) -> None:
    """Refuses a class that is not the one of its name in a known package, or whose methods were patched."""
    root = _root(kind.__module__)
    if root != own and (root not in _PACKAGES or _found(kind) is not kind):
        raise ValueError(
            f"{where} is a {kind.__name__} of {kind.__module__}, which is not known: what it computes is neither in "
            "the weights nor in the fingerprint. Load the pipeline anew without what replaced it."
        )
    _check_methods_of(kind, where, _CODE | {own})


def _check_methods_of(kind: type, where: str, roots: frozenset[str]) -> None:
    for base in kind.__mro__:
        if _root(base.__module__) not in roots or base is object:
            continue
        for name, value in list(base.__dict__.items()):
            foreign = _foreign(value, roots)
            if foreign is not None:
                raise ValueError(
                    f"{where}: {base.__name__}.{name} was replaced by {_said(foreign)}, so the pass is not the "
                    "class's own. Undo the patch, or restart Python without it."
                )


def _check_hooks(owner: Any, names: tuple[str, ...], where: str) -> None:
    for name in names:
        for hook in (getattr(owner, name, None) or {}).values():
            module, function = code_place(hook)
            watches = f"{module}.".startswith(_WATCHERS) or function.rpartition(".")[2] in _KEEPS_GRADIENTS
            if not watches:
                kind = name.strip("_").removeprefix("global_").removesuffix("s").replace("_", " ")
                raise ValueError(
                    f"{where} has a {kind} of unknown origin, {_said(hook)}: it can change what is computed, and no "
                    "weight shows it. Remove it (`handle.remove()`), or load the pipeline anew."
                )


def _check_methods(module: nn.Module, where: str) -> None:
    """Refuses methods that were replaced on the module itself."""
    for name, value in module.__dict__.items():
        if name in _HARMLESS or isinstance(value, nn.Module) or not callable(value):
            continue
        if hasattr(type(module), name):
            raise ValueError(
                f"{where}: its {name!r} was replaced by {_said(value)}, so the pass is not the class's own. Undo it "
                "with the package that did it, or load the pipeline anew."
            )


def _check_functions() -> None:
    """Refuses replaced functions of `torch.nn.functional`, as some packages of fast attention ask for."""
    for name, value in list(vars(torch.nn.functional).items()):
        foreign = _foreign(value, frozenset({"torch"}))
        if foreign is not None:
            raise ValueError(
                f"torch.nn.functional.{name} was replaced by {_said(foreign)}, so no pass is torch's own. Undo the "
                "patch, or restart Python without it."
            )


def check_hooks(part: nn.Module, what: str) -> None:
    """Refuses hooks of unknown origin on any of a part's modules.

    Args:
        part: Network, autoencoder or text encoder.
        what: Names it in messages.

    Raises:
        ValueError: There is one; the message names it.
    """
    for name, module in part.named_modules():
        _check_hooks(module, _HOOKS, f"{what}{f' ({name})' if name else ''}")


def check_code(part: nn.Module, what: str) -> None:
    """Refuses a part that runs code of unknown origin.

    Args:
        part: Network, autoencoder or text encoder.
        what: Names it in messages.

    Raises:
        ValueError: A hook, a replaced method, a class or a patched function is not known, or dropout is on; the message
            names it.
    """
    own = _root(type(part).__module__)
    _check_functions()
    _check_hooks(all_modules, _GLOBAL_HOOKS, "torch.nn.Module")
    check_hooks(part, what)
    kinds: set[type] = set()
    for name, module in part.named_modules():
        where = f"{what}{f' ({name})' if name else ''}"
        if type(module) not in kinds:
            _check_class(type(module), where, own)
        processor = type(getattr(module, "processor", None))
        if processor not in kinds:
            _check_methods_of(processor, where, _CODE | {own})
        kinds |= {type(module), processor}
        _check_methods(module, where)
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"{where} drops values at random (dropout {module.p:g} in training mode), so no two passes agree. Call "
                "`eval()` on it first."
            )
    for name, parameter in part.named_parameters():
        _check_hooks(parameter, ("_backward_hooks",), f"{what} ({name})")
