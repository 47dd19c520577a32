"""The two passes that EK-FAC is fitted by: covariances, then eigenvalues in their eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wherefrom.curvature.fisher_samples import FisherSettings, SampledPass, all_finite, zeros_like_parameters
from wherefrom.curvature.kronecker import KroneckerLayer, LayerPlan, gradient_rows
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.per_sample import PerSampleGradients
from wherefrom.models.diffusion import DiffusionModel

_SAMPLES = "samples"
_BLOCK = 256
# Numbers of per-sample gradients held at a time: on a CPU, few enough to stay in its cache.
_ON_CPU, _ELSEWHERE = 2**19, 2**26


def _rows(
    layer: KroneckerLayer, module: nn.Module, calls: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Float[Tensor, "b p i"], Float[Tensor, "b p o"]]:
    """Inputs and output gradients at each position, those of several calls one after the other."""
    inputs = [layer.input_rows(module, value) for value, _ in calls]
    grads = [gradient_rows(module, grad) for _, grad in calls]
    return (inputs[0], grads[0]) if len(calls) == 1 else (torch.cat(inputs, dim=1), torch.cat(grads, dim=1))


def _add_gram(total: Float[Tensor, "d d"], rows: Float[Tensor, "b p d"]) -> Float[Tensor, ""]:
    """Adds Σ rows rowsᵀ to the upper triangle of `total`; returns its trace, not finite if any number is not."""
    flat = rows.flatten(0, 1)
    trace = flat.new_zeros(())
    for start in range(0, flat.shape[1], _BLOCK):
        block = flat[:, start : start + _BLOCK]
        stop = start + block.shape[1]
        part = flat[:, :stop].T @ block
        total[:stop, start:stop] += part
        trace += part[start:].diagonal().sum()
    return trace


class CovariancePass(SampledPass):
    """Sums aaᵀ and ggᵀ over samples and positions (a `TrainingPass`); only their eigenvectors are used.

    Args:
        model: The pretrained model.
        data: Its training images.
        plan: The layers.
        settings: How to sample.
        batch_size: Samples at a time.

    Attributes:
        sums: The upper triangles of the sums, their columns in the order of places.

    Raises:
        ValueError: A gradient is not finite.
    """

    def __init__(
        self, model: DiffusionModel, data: EncodedImages, plan: LayerPlan, settings: FisherSettings, batch_size: int
    ) -> None:
        super().__init__(model, data, [f"{layer.module}.weight" for layer in plan.layers], settings, batch_size)
        self.plan = plan
        shapes = {f"A/{layer.source}": layer.inputs for layer in plan.layers}
        shapes |= {f"G/{layer.module}": layer.outputs for layer in plan.layers}
        self.sums = {
            name: torch.zeros(side, side, dtype=torch.float64, device=model.device) for name, side in shapes.items()
        }

    def add(self, tap: PerSampleGradients, losses: Float[Tensor, " b"], roots: Float[Tensor, " b"] | None) -> None:
        """Adds a batch."""
        calls = tap.by_layer(losses)
        traces = {}
        for layer in self.plan.layers:
            module = self.model.denoiser.get_submodule(layer.module)
            result = calls.pop(layer.module)
            trace = losses.new_zeros(())
            for inputs, grads in result:
                trace = trace + _add_gram(self.sums[f"G/{layer.module}"], gradient_rows(module, grads))
                if layer.source == layer.module:
                    rows = layer.input_rows(module, inputs)
                    rows = rows if roots is None else rows * roots[:, None, None]  # inputs do not scale with the loss
                    trace = trace + _add_gram(self.sums[f"A/{layer.source}"], rows)
            traces[layer.module] = trace
        all_finite(traces)

    def covariances(self) -> dict[str, Tensor]:
        """The sums as whole matrices, their columns in the usual order."""
        whole = {name: total.triu() + total.triu(1).T for name, total in self.sums.items()}
        for layer in self.plan.layers:
            if layer.source == layer.module and layer.places > 1:
                where = torch.argsort(layer.order()).to(self.model.device)
                whole[f"A/{layer.source}"] = whole[f"A/{layer.source}"][where][:, where]
        return whole

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Adds the sums of another process or of an earlier run."""
        orders = {f"A/{layer.source}": layer.order() for layer in self.plan.layers if layer.places > 1}
        for name, total in self.sums.items():
            values = state[name]
            if name in orders:
                values = values[orders[name]][:, orders[name]]
            total += values.to(total.device)
        self.samples += int(state[_SAMPLES])

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, in the usual order of columns, and the number of samples."""
        return {**self.covariances(), _SAMPLES: torch.tensor(self.samples)}


class EigenvaluePass(SampledPass):
    """Sums squared per-sample gradients in the eigenbasis, and plainly where there is none (a `TrainingPass`).

    Args:
        model: The pretrained model.
        data: Its training images.
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
        *,
        data: EncodedImages,
        plan: LayerPlan,
        eigenvectors: Mapping[str, Tensor],
        settings: FisherSettings,
        batch_size: int,
    ) -> None:
        names = [f"{layer.module}.weight" for layer in plan.layers] + list(plan.diagonal)
        super().__init__(model, data, names, settings, batch_size)
        self.plan = plan
        self.eigenvectors = eigenvectors
        self.sums = {
            f"L/{layer.module}": torch.zeros(layer.outputs, layer.inputs, dtype=torch.float64, device=model.device)
            for layer in plan.layers
        }
        self.diagonal = zeros_like_parameters(model, plan.diagonal)

    @cached_property
    def basis(self) -> dict[str, Tensor]:
        """The eigenvectors as the batches need them, the rows of Q_A in the order of places."""
        orders = {f"A/{layer.source}": layer.order() for layer in self.plan.layers if layer.places > 1}
        return {
            name: (value[orders[name]] if name in orders else value).to(self.model.device, self.model.dtype)
            for name, value in self.eigenvectors.items()
        }

    def add(self, tap: PerSampleGradients, losses: Float[Tensor, " b"], roots: Float[Tensor, " b"] | None) -> None:
        """Adds a batch."""
        calls = tap.by_layer(losses)
        totals = {}
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in self.diagonal):
            for name, gradients in tap.of_layer(owner, calls[owner]):
                squares = gradients.square().sum(dim=0)
                self.diagonal[name] += squares
                totals[name] = squares.sum()
        rotated: dict[str, Tensor] = {}
        for layer in self.plan.layers:
            squares = self._squares(layer, calls.pop(layer.module), rotated)
            self.sums[f"L/{layer.module}"] += squares
            totals[layer.module] = squares.sum()
        all_finite(totals)

    def _squares(
        self, layer: KroneckerLayer, calls: Sequence[tuple[Tensor, Tensor]], rotated: dict[str, Tensor]
    ) -> Float[Tensor, "o i"]:
        """Σ over samples of (Q_Gᵀ ∇W Q_A)², on each side rotating rows or matrices, whichever are fewer."""
        left, right = self.basis[f"G/{layer.module}"], self.basis[f"A/{layer.source}"]
        a, g = _rows(layer, self.model.denoiser.get_submodule(layer.module), calls)
        positions = a.shape[1]
        rows_right, rows_left = positions <= layer.outputs * layer.sharers, positions <= layer.inputs
        if rows_right and layer.sharers > 1:
            if layer.source not in rotated:
                rotated[layer.source] = a @ right
            a = rotated[layer.source]
        if rows_left:
            g = g @ left
        total = a.new_zeros(layer.outputs, layer.inputs)
        size = max(1, (_ON_CPU if a.device.type == "cpu" else _ELSEWHERE) // total.numel())
        for inputs, grads in zip(a.split(size), g.split(size), strict=True):
            if rows_right and layer.sharers == 1:
                inputs = inputs @ right
            gradients = grads.transpose(1, 2) @ inputs
            if not rows_left:
                gradients = left.T @ gradients
            if not rows_right:
                gradients = gradients @ right
            total += gradients.square_().sum(dim=0)
        return total

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Adds the sums of another process or of an earlier run."""
        for part in (self.sums, self.diagonal):
            for name, total in part.items():
                total += state[name].to(total.device)
        self.samples += int(state[_SAMPLES])

    def state_dict(self) -> dict[str, Tensor]:
        """The sums and the number of samples."""
        return {**self.sums, **self.diagonal, _SAMPLES: torch.tensor(self.samples)}
