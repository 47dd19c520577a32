"""Gradients of cross-attention keys and values, stored exactly as factors of an outer product.

A cross-attention key or value projection sees an image's caption states a at every timestep, so the mean of its
gradient over timesteps and noise samples is Σ_tokens ḡ aᵀ, with ḡ the mean of the output gradients at a token.
Storing ḡ (tokens × outputs numbers) instead of the gradient (outputs × inputs) loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wherefrom.curvature.base import CurvatureMatrix
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossPass
from wherefrom.gradients.per_sample import PerSampleGradients
from wherefrom.models.conditioning import PROMPT
from wherefrom.runtime.row_cache import Rows

_IMAGES_AT_A_TIME = 256
_LARGEST = 10  # a row in half precision is scaled by a power of two until its largest number is about 2¹⁰


def layers_of(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The layers whose weights these are.

    Raises:
        ValueError: One is not the weight of a linear layer.
    """
    result = []
    for name in names:
        owner, _, parameter = name.rpartition(".")
        if parameter != "weight" or not isinstance(model.get_submodule(owner), nn.Linear):
            raise ValueError(
                f"{name} is not the weight of a linear layer that sees captions only, so its gradients cannot be kept "
                "as factors: choose weights cross_attention_kv, or another compression.keep."
            )
        result.append(owner)
    return result


class TokenGradients:
    """ḡ of images and their mirror images, for each caption, layer and token.

    Args:
        losses: The losses that are differentiated, and their grid.
        names: Weights of linear layers that see caption states.
        weights: Of each item of the losses' grid in the mean; None weights all alike.
        half: Keep rows in half precision.

    Raises:
        ValueError: A weight is another layer's.
    """

    def __init__(
        self, losses: LossPass, names: Sequence[str], weights: Float[Tensor, " items"] | None, half: bool
    ) -> None:
        self.losses, self.weights, self.half = losses, weights, half
        self.names, self.layers = list(names), layers_of(losses.model.denoiser, names)
        self.dtype = torch.promote_types(losses.model.dtype, torch.float32)

    def rows(self, positions: range) -> Float[Tensor, "b f d"]:
        """The first number of a row is the power of two that the others are multiplied with.

        Raises:
            ValueError: A layer does not see the caption states, or a gradient is not finite.
        """
        losses, model = self.losses, self.losses.model
        flips, captions, items = losses.shape[0], losses.shape[1], len(losses.flip)
        sums: dict[str, Tensor] = {}
        for image, item in losses.batches(positions):
            of_flip = (image - positions.start) * flips + losses.flip[item]
            row = (of_flip * captions + losses.caption[item]).to(model.device)
            with torch.enable_grad(), PerSampleGradients(model.denoiser, self.names) as tap:
                each = losses.item_losses(image, item)
                if self.weights is not None:
                    each = each * self.weights[item].to(each)
                result = tap.by_layer(each)
            embeddings = losses.data.conditioning_at(image, losses.caption[item])[PROMPT]
            for layer in self.layers:
                ((inputs, gradients),) = result[layer]
                self._check(layer, inputs, embeddings)
                if layer not in sums:
                    shape = (len(positions) * flips * captions, *gradients.shape[1:])
                    sums[layer] = torch.zeros(shape, dtype=self.dtype, device=model.device)
                sums[layer].index_add_(0, row, gradients.to(self.dtype), alpha=flips / items)
        # (images, flips, captions, tokens, outputs of all layers side by side)
        whole = torch.cat([sums[layer] for layer in self.layers], dim=2)
        rows = whole.reshape(len(positions), flips, -1).cpu()
        losses.check_finite("gradient", positions, rows, "the model's weights")
        return self._packed(rows)

    @staticmethod
    def _check(layer: str, inputs: Tensor, states: Tensor) -> None:
        if inputs.shape != states.shape or not torch.allclose(inputs, states.to(inputs), rtol=1e-5, atol=1e-6):
            raise ValueError(
                f"{layer} is not fed with the caption states themselves, so its gradients cannot be kept as factors: "
                "choose another compression.keep, such as eigenbasis."
            )

    def _packed(self, rows: Float[Tensor, "b f d"]) -> Float[Tensor, "b f e"]:
        largest = rows.abs().amax(dim=2, keepdim=True)
        exponent = torch.where(largest > 0, _LARGEST - largest.log2().floor(), 0.0) if self.half else 0 * largest
        packed = torch.cat([-exponent, rows * torch.exp2(exponent)], dim=2)
        return packed.half() if self.half else packed


@dataclass(frozen=True)
class TokenBank:
    """The rows of `TokenGradients` of some images, and how influence is read from them.

    Attributes:
        rows: The rows.
        data: The images, whose caption states are the other factor.
        names: The weights, in the order of the rows.
        curvature: F, fitted.
    """

    rows: Rows
    data: EncodedImages
    names: tuple[str, ...]
    curvature: CurvatureMatrix

    def influence(self, gradients: Mapping[str, Float[Tensor, "..."]]) -> Float[Tensor, "n f"]:
        """∇L(ẑ)ᵀ F⁻¹ ∇L(z) of every image and mirror image.

        Args:
            gradients: The query's, by parameter name.
        """
        steps = self.curvature.precondition(gradients)
        step = torch.cat([steps[name] for name in self.names]).cpu()  # (outputs of all layers, inputs)
        values, result = self.rows.values, []
        for start in range(0, len(values), _IMAGES_AT_A_TIME):
            block = values[start : start + _IMAGES_AT_A_TIME].to(step.dtype)
            positions = torch.arange(start, start + len(block))
            products = self.data.conditioning_at(positions, slice(None))[PROMPT].to(step.dtype) @ step.T
            factors = block[..., 1:].unflatten(2, products.shape[1:])
            result.append(torch.einsum("bfklo,bklo->bf", factors, products) * torch.exp2(block[..., 0]))
        return torch.cat(result).double()
