"""Directional derivatives ∇l(z)ᵀ v of training losses in weight space; v = F⁻¹ ∇L(ẑ) / N gives influence functions.

One pass over the training set serves many directions: the per-sample gradient of each layer is computed once,
multiplied with all directions and discarded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossGrid, LossPass
from wherefrom.gradients.per_sample import PerSampleGradients
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Progress
from wherefrom.runtime.dataset_pass import run_pass
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.stable_names import settings_identity
from wherefrom.runtime.tensor_hash import hash_tensors


class DerivativePass(LossPass):
    """∇l(z)ᵀ v of every image, flip, caption, timestep, noise sample and direction v (a `TrainingPass`).

    The result is `losses`, of shape (N, F, K, T, R, Q); NaN where not yet computed.

    Args:
        model: The model.
        data: The images.
        grid: Where the losses are differentiated.
        batch_size: Samples at a time.
        directions: By parameter name, one direction a row: shape (Q, *parameter).

    Raises:
        ValueError: A derivative is not finite, or a layer has no per-sample gradient.
    """

    def __init__(
        self,
        model: DiffusionModel,
        data: EncodedImages,
        grid: LossGrid,
        batch_size: int,
        directions: Mapping[str, Float[Tensor, "q ..."]],
    ) -> None:
        super().__init__(model, data, grid, batch_size)
        self.directions = {name: value.flatten(1).T.contiguous() for name, value in directions.items()}
        self.count = next(iter(self.directions.values())).shape[1]
        self.losses = torch.full((len(data), *self.shape, self.count), float("nan"), dtype=model.dtype)

    def _measure(self, image: Tensor, item: Tensor) -> Tensor:
        with torch.enable_grad(), PerSampleGradients(self.model.denoiser, list(self.directions)) as tap:
            losses = self.item_losses(image, item)
            total = torch.zeros(len(item), self.count, dtype=losses.dtype, device=losses.device)
            for name, gradients in tap.per_sample(losses):
                total += gradients.flatten(1) @ self.directions[name]
        return total.cpu()


def measure_derivatives(
    model: DiffusionModel,
    *,
    data: EncodedImages,
    grid: LossGrid,
    directions: Mapping[str, Float[Tensor, "q ..."]],
    store: Store,
    runner: Runner,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Float[Tensor, "n f k t r q"]:
    """∇l(z)ᵀ v of all images and directions, cached in the store.

    Args:
        model: The model.
        data: The images.
        grid: Where the losses are differentiated.
        directions: By parameter name, one direction a row.
        store: Cache of finished derivatives.
        runner: Rank and world size of this process.
        batch_size: Samples at a time; does not change the result.
        progress: Called with (done, total) chunks.

    Raises:
        ValueError: A derivative is not finite, or a layer has no per-sample gradient.
        StorageError: The store could not be written.
    """
    identity: dict[str, Any] = {
        "model": model.fingerprint(),
        "data": data.fingerprint,
        "dtype": str(model.dtype),
        "directions": hash_tensors(dict(directions)),
        **settings_identity(grid),
    }
    work = run_pass(
        lambda: DerivativePass(model, data, grid, batch_size, directions),
        count=len(data),
        store=store,
        kind="derivatives",
        identity=identity,
        runner=runner,
        progress=progress,
    )
    return work.losses
