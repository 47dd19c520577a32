"""Per-sample gradients of adapters whose tensors are multiplied into one weight: LoHa and LoKr in peft's layers.

With G the gradient of such a layer's whole weight, of one sample, a factor's gradient is G pulled back through the
product: exact, and without autograd over samples. LoRA's factors are layers of their own and need none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wherefrom.models.adapter_weights import hadamard, kronecker

PerSample = Callable[[Any, Tensor, Tensor], Tensor]


def wrapping_layer(model: nn.Module, owner: str) -> Any:
    """The layer that computes with a table of adapters' parameters, such as `to_k` for `to_k.hada_w1_a`; else None."""
    if not isinstance(model.get_submodule(owner), nn.ParameterDict):
        return None
    layer = model.get_submodule(owner.rpartition(".")[0])
    return layer if hasattr(layer, "hada_w1_a") or hasattr(layer, "lokr_w1") else None


def innermost(layer: Any) -> nn.Module:
    """The layer below all adapters."""
    while hasattr(layer, "adapter_layer_names"):
        layer = layer.base_layer
    result: nn.Module = layer
    return result


def factor_rule(layer: Any, part: str, adapter: str, of_weight: PerSample) -> PerSample:
    """How one of an adapter's factors gets each sample's gradient.

    Args:
        layer: peft's layer.
        part: The factor: `hada_w1_a`, …
        adapter: The adapter.
        of_weight: Gives the gradient of the whole weight of the layer below.
    """
    product = hadamard if hasattr(layer, "hada_w1_a") else kronecker

    def rule(module: nn.Module, inputs: Tensor, grads: Tensor) -> Float[Tensor, "b ..."]:
        base: Any = innermost(layer)
        whole = of_weight(base, inputs, grads) * layer.scaling[adapter]
        parts = {
            name: getattr(layer, name)[adapter].detach()
            for name in layer.adapter_layer_names
            if adapter in getattr(layer, name)
        }

        def made(value: Tensor) -> Tensor:
            return product({**parts, part: value}).reshape(base.weight.shape)

        pull: Any = torch.func.vjp(made, parts[part])[1]
        pulled: Tensor = torch.vmap(lambda each: pull(each)[0])(whole)
        return pulled

    return rule
