"""The two passes that EK-FAC is fitted by: covariances, then eigenvalues in their eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from wherefrom.curvature.kronecker import KroneckerLayer, LayerPlan
from wherefrom.curvature.sampling import FisherSettings, SampledPass, finite, zeros_like_parameters
from wherefrom.data.latents import LatentSet
from wherefrom.diffusion import DiffusionModel
from wherefrom.gradients import PerSampleGradients

_SAMPLES = "samples"


def _gram(rows: Float[Tensor, "b p d"]) -> Float[Tensor, "d d"]:
    flat = rows.flatten(0, 1)
    return (flat.T @ flat).double()


class CovariancePass(SampledPass):
    """Sums aaᵀ and ggᵀ over samples and positions (a `TrainingPass`); only their eigenvectors are used.

    Args:
        model: The pretrained model.
        data: Its training pictures.
        plan: The layers.
        settings: How to sample.
        batch_size: Samples at a time.

    Raises:
        ValueError: A gradient is not finite.
    """

    def __init__(
        self, model: DiffusionModel, data: LatentSet, plan: LayerPlan, settings: FisherSettings, batch_size: int
    ) -> None:
        super().__init__(model, data, [f"{layer.module}.weight" for layer in plan.layers], settings, batch_size)
        self.plan = plan
        shapes = {f"A/{layer.source}": layer.inputs for layer in plan.layers}
        shapes |= {f"G/{layer.module}": layer.outputs for layer in plan.layers}
        self.sums = {
            name: torch.zeros(side, side, dtype=torch.float64, device=model.device) for name, side in shapes.items()
        }

    def add(self, tap: PerSampleGradients, losses: Float[Tensor, "b"]) -> None:
        """Adds a batch."""
        calls = tap.by_layer(losses)
        for layer in self.plan.layers:
            module = self.model.denoiser.get_submodule(layer.module)
            for inputs, grads in calls[layer.module]:
                a, g = layer.rows(module, inputs, grads)
                self.sums[f"G/{layer.module}"] += finite(layer.module, _gram(g))
                if layer.source == layer.module:
                    self.sums[f"A/{layer.module}"] += finite(layer.module, _gram(a))

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Adds sums made elsewhere."""
        for name, total in self.sums.items():
            total += state[name].to(total.device)
        self.samples += int(state[_SAMPLES])

    def state_dict(self) -> dict[str, Tensor]:
        """The sums and the number of samples."""
        return {**self.sums, _SAMPLES: torch.tensor(self.samples)}


class EigenvaluePass(SampledPass):
    """Sums squared per-sample gradients in the eigenbasis, and plainly where there is none (a `TrainingPass`).

    Args:
        model: The pretrained model.
        data: Its training pictures.
        plan: The layers.
        eigenvectors: `A/source` and `G/module` -> eigenvectors in columns.
        settings: How to sample.
        batch_size: Samples at a time.

    Raises:
        ValueError: A gradient is not finite.
    """

    def __init__(
        self,
        model: DiffusionModel,
        data: LatentSet,
        plan: LayerPlan,
        eigenvectors: Mapping[str, Tensor],
        settings: FisherSettings,
        batch_size: int,
    ) -> None:
        names = [f"{layer.module}.weight" for layer in plan.layers] + list(plan.diagonal)
        super().__init__(model, data, names, settings, batch_size)
        self.plan = plan
        self.basis = {name: value.to(model.device, model.dtype) for name, value in eigenvectors.items()}
        self.sums = {
            f"L/{layer.module}": torch.zeros(layer.outputs, layer.inputs, dtype=torch.float64, device=model.device)
            for layer in plan.layers
        }
        self.diagonal = zeros_like_parameters(model, plan.diagonal)

    def add(self, tap: PerSampleGradients, losses: Float[Tensor, "b"]) -> None:
        """Adds a batch."""
        calls = tap.by_layer(losses)
        rotated: dict[tuple[str, int], Tensor] = {}
        for layer in self.plan.layers:
            gradient = sum(
                self._in_basis(layer, call, inputs, grads, rotated)
                for call, (inputs, grads) in enumerate(calls[layer.module])
            )
            assert isinstance(gradient, Tensor)
            self.sums[f"L/{layer.module}"] += finite(layer.module, gradient.square().sum(dim=0))
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in self.diagonal):
            for name, gradients in tap.of_layer(owner, calls[owner]):
                self.diagonal[name] += finite(name, gradients.square().sum(dim=0))

    def _in_basis(
        self, layer: KroneckerLayer, call: int, inputs: Tensor, grads: Tensor, rotated: dict[tuple[str, int], Tensor]
    ) -> Float[Tensor, "b o i"]:
        """Q_Gᵀ ∇W Q_A of each sample, rotating rows or matrices, whichever are fewer."""
        left, right = self.basis[f"G/{layer.module}"], self.basis[f"A/{layer.source}"]
        a, g = layer.rows(self.model.denoiser.get_submodule(layer.module), inputs, grads)
        positions, i, o = a.shape[1], layer.inputs, layer.outputs
        if positions * (i * i / layer.sharers + o * o) > o * i * (o + i):
            return left.T @ (g.transpose(1, 2) @ a) @ right
        key = (layer.source, call)
        if key not in rotated:
            rotated[key] = a @ right
        return (g @ left).transpose(1, 2) @ rotated[key]

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Adds sums made elsewhere."""
        for part in (self.sums, self.diagonal):
            for name, total in part.items():
                total += state[name].to(total.device)
        self.samples += int(state[_SAMPLES])

    def state_dict(self) -> dict[str, Tensor]:
        """The sums and the number of samples."""
        return {**self.sums, **self.diagonal, _SAMPLES: torch.tensor(self.samples)}
