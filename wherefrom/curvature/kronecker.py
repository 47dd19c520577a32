"""Which layers have a Kronecker-factored curvature, which of them share an input, and what each multiplies.

The columns of a convolution's matrix are (c_in, kh, kw) wherever a matrix is kept. Inside a pass they are (kh, kw,
c_in), the *order of places*: patches are then copied in long runs, several times faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.per_sample import PerSampleGradients, input_of, version_of
from wherefrom.models.diffusion import DiffusionModel


@dataclass(frozen=True)
class KroneckerLayer:
    """A linear or convolution layer as EK-FAC sees it.

    Attributes:
        module: Its name.
        bias: Whether the bias is the matrix's last column.
        source: The first layer that gets the same input: layers with one source share Q_A.
        inputs: I, the bias's column included.
        outputs: O.
        sharers: How many layers have this source.
        places: Places of a convolution's kernel; 1 for a linear layer.
    """

    module: str
    bias: bool
    source: str
    inputs: int
    outputs: int
    sharers: int = 1
    places: int = 1

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that make up the matrix."""
        return [f"{self.module}.weight", *([f"{self.module}.bias"] if self.bias else [])]

    def order(self) -> Tensor:
        """For each column in the order of places, where it stands in the usual order."""
        channels = (self.inputs - self.bias) // self.places
        columns = torch.arange(channels * self.places).reshape(channels, self.places).T.flatten()
        return torch.cat([columns, torch.arange(len(columns), self.inputs)])

    def input_rows(self, module: nn.Module, inputs: Tensor) -> Float[Tensor, "b p i"]:
        """What the weight multiplies at each position, with a 1 for the bias; columns in the order of places."""
        if isinstance(module, nn.Conv2d):
            values = _patches(module, inputs)
        else:
            values = inputs.unsqueeze(1) if inputs.dim() == 2 else inputs.flatten(1, -2)
            if not self.bias:
                return values
        columns = self.inputs - self.bias
        rows = values.new_empty(len(values), values[0].numel() // columns, self.inputs)
        rows[..., :columns].view(values.shape).copy_(values)
        rows[..., columns:] = 1.0
        return rows


def gradient_rows(module: nn.Module, grads: Tensor) -> Float[Tensor, "b p o"]:
    """A layer's output gradient at each position."""
    if isinstance(module, nn.Conv2d):
        return grads.flatten(2).transpose(1, 2)
    return grads.unsqueeze(1) if grads.dim() == 2 else grads.flatten(1, -2)


def _patches(module: nn.Conv2d, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b y x kh kw c"]:
    """A view of the patches that a convolution multiplies."""
    assert not isinstance(module.padding, str)
    (high, wide), (down, right) = module.padding, module.stride
    places = F.pad(inputs.permute(0, 2, 3, 1), (0, 0, wide, wide, high, high)).contiguous()
    for dimension, size, dilation, stride in zip(
        (1, 2), module.kernel_size, module.dilation, (down, right), strict=True
    ):
        places = places.unfold(dimension, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return places.permute(0, 1, 2, 4, 5, 3)


@dataclass(frozen=True)
class LayerPlan:
    """Which layers have a Kronecker form, and which parameters have none.

    Attributes:
        layers: Those that do.
        diagonal: Names of the parameters that do not.
    """

    layers: tuple[KroneckerLayer, ...]
    diagonal: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """All parameters."""
        return [name for layer in self.layers for name in layer.parameters] + list(self.diagonal)

    def blocks(self, layers_per_pass: int | None) -> list[LayerPlan]:
        """Parts of at most so many Kronecker layers; the diagonal goes with the first."""
        size = layers_per_pass or max(1, len(self.layers))
        starts = range(0, max(1, len(self.layers)), size)
        return [
            LayerPlan(_with_sources(self.layers[start : start + size]), () if start else self.diagonal)
            for start in starts
        ]

    def memory(self) -> int:
        """Bytes of the sums, eigenvectors and eigenvalues in float64: the most that fitting holds at a time.

        That is beside what it has found (`kept`), the model and a batch.
        """
        vectors, eigenvalues = self._numbers()
        return 8 * max(2 * vectors + eigenvalues, vectors + 2 * eigenvalues)

    def kept(self, itemsize: int) -> int:
        """Bytes of what is found, in numbers of so many bytes."""
        return itemsize * sum(self._numbers())

    def _numbers(self) -> tuple[int, int]:
        """How many numbers eigenvectors and eigenvalues are."""
        sources = {layer.source: layer.inputs**2 for layer in self.layers}
        outputs = sum(layer.outputs**2 for layer in self.layers)
        return sum(sources.values()) + outputs, sum(layer.inputs * layer.outputs for layer in self.layers)


def _with_sources(layers: Sequence[KroneckerLayer]) -> tuple[KroneckerLayer, ...]:
    """The layers, each source being the first layer of this block that has it."""
    by_source: dict[str, list[KroneckerLayer]] = {}
    for layer in layers:
        by_source.setdefault(layer.source, []).append(layer)
    return tuple(
        replace(layer, source=by_source[layer.source][0].module, sharers=len(by_source[layer.source]))
        for layer in layers
    )


@torch.no_grad()
def plan_layers(model: DiffusionModel, data: EncodedImages, names: Sequence[str]) -> LayerPlan:
    """Sorts parameters into Kronecker layers and the rest, and finds by one forward pass which layers share inputs.

    Raises:
        ValueError: A parameter belongs to a kind of layer without a rule.
    """
    wanted = set(names)
    PerSampleGradients(model.denoiser, names)  # refuses what has no rule
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    modules = {
        owner: module
        for owner in owners
        if isinstance(module := model.denoiser.get_submodule(owner), nn.Linear | nn.Conv2d)
        and f"{owner}.weight" in wanted
    }
    seen: dict[str, list[tuple[Tensor, int | None]]] = {owner: [] for owner in modules}

    def keep(owner: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            read = input_of(owner, layer, inputs, named)
            seen[owner].append((read, version_of(read)))

        return hook

    handles = [module.register_forward_pre_hook(keep(owner), with_kwargs=True) for owner, module in modules.items()]
    try:
        latents = data.latents_at(torch.zeros(1, dtype=torch.int64), 0).to(model.device, model.dtype)
        conditioning = data.conditioning_at(torch.zeros(1, dtype=torch.int64), 0).to(model.device, model.dtype)
        timestep = torch.zeros(1, dtype=torch.int64, device=model.device)
        model.losses(latents, conditioning, timestep, torch.zeros_like(latents))
    finally:
        for handle in handles:
            handle.remove()
    first: dict[Any, str] = {}
    layers = []
    for owner, module in modules.items():
        bias = f"{owner}.bias" in wanted
        weight = module.weight.flatten(1)
        geometry: Any = ()
        if isinstance(module, nn.Conv2d):
            geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
        if not seen[owner]:
            raise ValueError(
                f"The model does not call {owner}, so it has no curvature. Choose a weight subset without this layer."
            )
        # The inputs are still held by `seen`, so an id is one tensor; changed in place, it is another input.
        key = (tuple((id(value), version) for value, version in seen[owner]), bias, geometry)
        source = first.setdefault(key, owner)
        places = module.weight[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        layers.append(KroneckerLayer(owner, bias, source, weight.shape[1] + bias, weight.shape[0], places=places))
    kronecker = {name for layer in layers for name in layer.parameters}
    return LayerPlan(_with_sources(layers), tuple(name for name in names if name not in kronecker))
