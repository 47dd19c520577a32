"""Gradients of cross-attention keys and values, stored exactly as factors of an outer product.

The input of a cross-attention key or value projection is the caption's prompt embedding a (one vector a token), the
same at every timestep. The mean of its weight gradient over timesteps and noise samples is therefore Σ_tokens ḡ aᵀ,
with ḡ the mean gradient at the layer's output for that token. Storing ḡ (tokens × outputs numbers) instead of the
weight gradient (outputs × inputs) is lossless, because a is known from the encoded captions.
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
_LARGEST = 10  # exponent: float16 rows are scaled by a power of two so that their largest number is about 2¹⁰


def layers_of(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Names of the linear layers that own these weights.

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
    """ḡ of images and their mirror images, for each caption, token and layer output, as rows of a bank.

    Args:
        losses: The losses that are differentiated, and their grid.
        names: Weights of linear layers whose inputs are prompt embeddings.
        weights: Weight in the mean of each grid item (flip, caption, timestep, noise sample); None weights all equally.
        half: Store rows in float16.

    Raises:
        ValueError: A weight does not belong to a linear layer.
    """

    def __init__(
        self, losses: LossPass, names: Sequence[str], weights: Float[Tensor, " items"] | None, half: bool
    ) -> None:
        self.losses, self.weights, self.half = losses, weights, half
        self.names, self.layers = list(names), layers_of(losses.model.denoiser, names)
        self.dtype = torch.promote_types(losses.model.dtype, torch.float32)

    def rows(self, positions: range) -> Float[Tensor, "b f d"]:
        """Rows [e, ḡ · 2⁻ᵉ] of the images at these positions; ḡ is flattened from (captions, tokens, outputs).

        e is the exponent that brings a row into the range of float16; 0 where rows are not in half precision.

        Raises:
            ValueError: The input of a layer is not the prompt embeddings, or a gradient is not finite.
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
                if len(result[layer]) != 1:
                    raise ValueError(
                        f"The model calls {layer} {len(result[layer])} times, so its gradients cannot be kept as "
                        "factors: choose another compression.keep, such as eigenbasis."
                    )
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
    """Rows of `TokenGradients`, and influence computed from them: Σ_tokens ḡᵀ (F⁻¹ ∇L(ẑ)) a.

    Attributes:
        rows: The rows, shape (N, F, 1 + K · tokens · outputs).
        data: The images, whose prompt embeddings a are the other factor.
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
