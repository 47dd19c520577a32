"""Exact per-sample gradients, layer by layer, from each layer's input and output gradient.

No whole-model gradient is stored.

What is kept of a layer's output is its place in autograd's graph, not the tensor, so a model may change the tensor
in place (`nn.SiLU(inplace=True)`, `x += y`). What is kept of its input are the values, so changing these afterwards is
refused, as autograd itself refuses it.

For a linear layer with input a and output gradient g of one sample, the weight's gradient is Σ_positions g aᵀ; a
convolution is one over its unfolded patches; a normalisation's scale has Σ g x̂. A table that a transformer adds to each
sample (`scale_shift_table` of PixArt's blocks) is replaced by a copy for each. `adapter_rules` has LoHa and LoKr.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import RMSNorm
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from wherefrom.gradients.adapter_rules import factor_rule, innermost, wrapping_layer

_PerSample = Callable[[Any, Tensor, Tensor], Tensor]


def _linear(module: nn.Linear, inputs: Tensor, grads: Tensor) -> Tensor:
    return (
        torch.bmm(grads.flatten(1, -2).transpose(1, 2), inputs.flatten(1, -2))
        if inputs.dim() > 2
        else (grads.unsqueeze(2) * inputs.unsqueeze(1))
    )


def _convolution(module: nn.Conv2d, inputs: Tensor, grads: Tensor) -> Tensor:
    padding: Any = module.padding
    patches = F.unfold(inputs, module.kernel_size, module.dilation, padding, module.stride)
    return torch.bmm(grads.flatten(2), patches.transpose(1, 2)).reshape(-1, *module.weight.shape)


def _group_norm(module: nn.GroupNorm, inputs: Tensor, grads: Tensor) -> Tensor:
    normalised = F.group_norm(inputs, module.num_groups, eps=module.eps)
    return (grads * normalised).flatten(2).sum(dim=2) if inputs.dim() > 2 else grads * normalised


def _layer_norm(module: nn.LayerNorm, inputs: Tensor, grads: Tensor) -> Tensor:
    normalised = F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    return _over_positions(grads * normalised, len(module.normalized_shape))


def _rms_norm(module: nn.Module, inputs: Tensor, grads: Tensor) -> Tensor:
    settings: Any = module
    scale = torch.rsqrt(inputs.square().mean(dim=-1, keepdim=True) + settings.eps)
    return _over_positions(grads * inputs * scale, 1)


def _channels_first_bias(module: nn.Module, inputs: Tensor, grads: Tensor) -> Tensor:
    return grads.flatten(2).sum(dim=2) if grads.dim() > 2 else grads


def _linear_bias(module: nn.Linear, inputs: Tensor, grads: Tensor) -> Tensor:
    return _over_positions(grads, 1)


def _layer_norm_bias(module: nn.LayerNorm, inputs: Tensor, grads: Tensor) -> Tensor:
    return _over_positions(grads, len(module.normalized_shape))


def _over_positions(terms: Tensor, kept: int) -> Tensor:
    """Sums everything between the batch and the last `kept` dimensions."""
    between = tuple(range(1, terms.dim() - kept))
    return terms.sum(dim=between) if between else terms


_RULES: Mapping[type[nn.Module], Mapping[str, _PerSample]] = {
    nn.Linear: {"weight": _linear, "bias": _linear_bias},
    nn.Conv2d: {"weight": _convolution, "bias": _channels_first_bias},
    nn.GroupNorm: {"weight": _group_norm, "bias": _channels_first_bias},
    nn.LayerNorm: {"weight": _layer_norm, "bias": _layer_norm_bias},
    RMSNorm: {"weight": _rms_norm},
}


def _table(module: nn.Module, inputs: Tensor, grads: Tensor) -> Tensor:
    return grads


class _Copies:
    """Stands for a table while a forward pass reads it: `table[None]` has a row for each sample in place of one."""

    def __init__(self, table: Tensor, samples: int) -> None:
        self.rows = table.detach()[None].expand(samples, *table.shape).clone().requires_grad_()
        self.device, self.dtype = table.device, table.dtype

    def __getitem__(self, index: None) -> Tensor:
        assert index is None, "a table is read as a whole"
        return self.rows


_TABLE, _WITH_TABLE = "scale_shift_table", (BasicTransformerBlock, PixArtTransformer2DModel)


def _rule(module: nn.Module, name: str, parameter: str) -> _PerSample:
    if parameter == _TABLE and isinstance(module, _WITH_TABLE):
        return _table
    rules: Any = next((rules for kind, rules in _RULES.items() if isinstance(module, kind)), None)
    grouped = isinstance(module, nn.Conv2d) and (
        module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
    )
    if rules is None or parameter not in rules or grouped:
        raise ValueError(
            f"No per-sample gradient for {name} ({type(module).__name__}): linear layers, ungrouped zero-padded "
            "convolutions, group, layer "
            "and root-mean-square norms, and PixArt's tables have one. Choose a weight subset without it."
        )
    chosen: _PerSample = rules[parameter]
    return chosen


def _restore_table(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    vars(layer).pop(_TABLE, None)


def _refuse_shared(module: nn.Module, names: Sequence[str]) -> None:
    """A weight that two layers share has the sum of both gradients; a tap of one of them would give half of it."""
    owners: dict[int, dict[int, str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        layer = module.get_submodule(name.rpartition(".")[0])
        owners.setdefault(id(parameter), {}).setdefault(id(layer), name)
    for name in names:
        found = sorted(owners[id(module.get_parameter(name))].values())
        if len(found) > 1:
            raise ValueError(
                f"No per-sample gradient for {name}: the layers of {' and '.join(found)} share this parameter. Choose "
                "a weight subset without it."
            )


def input_of(owner: str, layer: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The tensor that a layer multiplies, given by position or by name.

    Raises:
        ValueError: There is none.
    """
    first = next(iter(inspect.signature(layer.forward).parameters), "") if not inputs else ""
    found = inputs[0] if inputs else named.get(first)
    if not isinstance(found, Tensor):
        given = ", ".join([*(type(each).__name__ for each in inputs), *named]) or "nothing"
        raise ValueError(
            f"No per-sample gradient for {owner} ({type(layer).__name__}): its first argument should be a tensor, and "
            f"the model calls it with {given}. Choose a weight subset without it."
        )
    return found


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None where torch does not count (tensors of inference mode)."""
    return None if tensor.is_inference() else tensor._version


class _Begin(torch.autograd.Function):
    """The same tensor, where a graph begins. Unlike a leaf that requires gradients it may be changed in place."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True)
class _Call:
    """What one call of a layer leaves: its input, how often that was changed, and where its output's gradient is."""

    owner: str
    inputs: Tensor
    version: int | None
    output: GradientEdge
    shape: torch.Size

    @classmethod
    def of(cls, owner: str, inputs: Tensor, output: Tensor) -> _Call:
        return cls(owner, inputs.detach(), version_of(inputs), get_gradient_edge(output), output.shape)


class PerSampleGradients:
    """Taps a module's layers so that one backward pass gives the gradient of every sample apart.

    Use as a context manager; inside, run the forward pass and call `per_sample` with one loss per sample. A layer may
    be called several times, and its output may be changed in place.

    Args:
        module: The model; samples must not mix in it (no batch norm).
        names: Full names of the parameters wanted.

    Raises:
        ValueError: A parameter belongs to a kind of layer without a rule, or to two layers. Later, by name: a layer was
            not called, or its input was changed in place after it was read.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._layers: dict[str, tuple[nn.Module, dict[str, _PerSample]]] = {}
        self._called: dict[str, nn.Module] = {}  # what is called for parameters that stand in a table
        for name in names:
            owner, _, parameter = name.rpartition(".")
            layer, wrapping = module.get_submodule(owner), wrapping_layer(module, owner)
            if wrapping is not None:
                of_weight = _rule(innermost(wrapping), name, "weight")
                rule = factor_rule(wrapping, owner.rpartition(".")[2], parameter, of_weight)
                self._called[owner] = wrapping
            else:
                rule = _rule(layer, name, parameter)
            self._layers.setdefault(owner, (layer, {}))[1][parameter] = rule
        _refuse_shared(module, names)
        self._anchor = torch.zeros((), requires_grad=True)
        self._calls: list[_Call] = []
        self._handles: list[Any] = []
        self._backward = False

    def __enter__(self) -> PerSampleGradients:
        for owner, (layer, rules) in self._layers.items():
            if _TABLE in rules:
                self._handles.append(layer.register_forward_pre_hook(self._copy_table(owner), with_kwargs=True))
                self._handles.append(layer.register_forward_hook(_restore_table, always_call=True))
            else:
                called = self._called.get(owner, layer)
                self._handles.append(called.register_forward_hook(self._hook(owner), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()

    def _hook(self, owner: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
        def keep(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise ValueError(
                    f"No per-sample gradient for {owner} ({type(layer).__name__}): the model runs it without gradients "
                    "(torch.no_grad, or reentrant checkpointing). Choose a weight subset without it."
                )
            read = input_of(owner, layer, inputs, named)
            if output._is_view():
                # A change in place of a view is recorded at its base, past this place in the graph: this is no view.
                output = torch.ops.aten._unsafe_view(output, output.shape)
            if not output.requires_grad:
                # The graph starts here: neither weights nor inputs need ask for gradients.
                output = _Begin.apply(self._anchor, output)
            if not self._backward:  # there, gradient checkpointing computes a layer again
                self._calls.append(_Call.of(owner, read, output))
            return output

        return keep

    def _copy_table(self, owner: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def copy(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            samples = next(len(each) for each in (*inputs, *named.values()) if isinstance(each, Tensor))
            copies = _Copies(layer.get_parameter(_TABLE), samples)
            vars(layer)[_TABLE] = copies  # found before the parameter, which `nn.Module.__getattr__` would give
            if not self._backward:
                self._calls.append(_Call.of(owner, copies.rows, copies.rows))

        return copy

    def _gradients(self, losses: Float[Tensor, " b"], calls: Sequence[_Call]) -> list[Tensor]:
        self._backward = True
        try:
            grads: Sequence[Tensor | None] = torch.autograd.grad(
                losses.sum(), [call.output for call in calls], allow_unused=True
            )
        finally:
            self._backward = False
        # An output that no loss depends on has no gradient in autograd's words; it is zero.
        return [
            call.inputs.new_zeros(call.shape) if grad is None else grad for call, grad in zip(calls, grads, strict=True)
        ]

    def by_layer(self, losses: Float[Tensor, " b"]) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """(input, output gradient) of each layer's calls, by the layer's name, in the order of the forward pass.

        Raises:
            ValueError: A layer was not called, or its input was changed in place after the layer had read it.
        """
        calls, self._calls = self._calls, []
        missing = [owner for owner in self._layers if owner not in {call.owner for call in calls}]
        if missing:
            raise ValueError(
                f"No per-sample gradient for {', '.join(missing[:5])}{' …' if missing[5:] else ''}: the model does not "
                f"call {'these layers' if missing[1:] else 'this layer'} (it may use a weight without its layer). "
                "Choose a weight subset without such layers."
            )
        result: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for call, grad in zip(calls, self._gradients(losses, calls), strict=True):
            layer, rules = self._layers[call.owner]
            if version_of(call.inputs) != call.version:
                raise ValueError(
                    f"No per-sample gradient for {call.owner} ({type(layer).__name__}): the model changes the layer's "
                    "input in place after the layer has read it (`x += y`, `x.mul_(…)`, `inplace=True`). Write it so "
                    "that it makes a new tensor, or choose a weight subset without this layer."
                )
            dtype = layer.get_parameter(next(iter(rules))).dtype  # under autocast both are of fewer bits
            result.setdefault(call.owner, []).append((call.inputs.to(dtype), grad.to(dtype)))
        return result

    def of_layer(
        self, owner: str, calls: Sequence[tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[str, Float[Tensor, "b ..."]]]:
        """Yields (parameter name, gradient of each sample) of one layer, summed over its calls."""
        layer, rules = self._layers[owner]
        for parameter, rule in rules.items():
            parts = [rule(layer, inputs, grad) for inputs, grad in calls]
            name = f"{owner}.{parameter}" if owner else parameter
            yield name, parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)

    def per_sample(self, losses: Float[Tensor, " b"]) -> Iterator[tuple[str, Float[Tensor, "b ..."]]]:
        """Yields (parameter name, gradient of each sample's own loss), layer by layer."""
        for owner, calls in self.by_layer(losses).items():
            yield from self.of_layer(owner, calls)
