"""Projected gradients of pictures, and the regularised inner product that TRAK and D-TRAK score by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wherefrom.data.latents import LatentSet
from wherefrom.diffusion import DiffusionModel
from wherefrom.gradients import PerSampleGradients
from wherefrom.losses import LossGrid, LossPass
from wherefrom.passes import Progress, run_pass
from wherefrom.projection import Projection
from wherefrom.runner import Runner
from wherefrom.storage import Store

_GRADIENT_BYTES = 512 * 2**20  # of gradients held at a time, before they are projected


class FeaturePass(LossPass):
    """Pᵀ(mean over captions, timesteps and draws of ∇l) of every picture and mirror image (a `TrainingPass`).

    Args:
        model: The model.
        data: The pictures.
        grid: Where the losses are differentiated.
        batch_size: Samples at a time.
        names: Parameters.
        projection: P.

    Raises:
        ValueError: A gradient is not finite, or a layer has no per-sample gradient.
    """

    def __init__(
        self,
        model: DiffusionModel,
        data: LatentSet,
        grid: LossGrid,
        batch_size: int,
        names: Sequence[str],
        projection: Projection,
    ) -> None:
        super().__init__(model, data, grid, batch_size)
        self.names, self.projection = list(names), projection
        self.losses = torch.full((len(data), self.shape[0], projection.dimension), float("nan"), dtype=model.dtype)
        shapes = {name: parameter.shape for name, parameter in model.denoiser.named_parameters()}
        self.sizes = {name: shapes[name].numel() for name in self.names}
        row = self.shape[0] * sum(self.sizes.values()) * torch.finfo(model.dtype).bits // 8
        self.pictures_at_a_time = max(1, _GRADIENT_BYTES // row)

    def step(self, positions: range) -> None:
        """Projects the pictures at these positions."""
        for start in range(positions.start, positions.stop, self.pictures_at_a_time):
            part = range(start, min(start + self.pictures_at_a_time, positions.stop))
            features = self.projection.project(self._gradients(part)).reshape(len(part), *self.losses.shape[1:])
            if not torch.isfinite(features).all():
                worst = part.start + int((~torch.isfinite(features)).flatten(1).any(dim=1).nonzero()[0])
                raise ValueError(
                    f"The gradient of picture {self.data.ids[worst]!r} is not finite: check the model's weights."
                )
            self.losses[part.start : part.stop] = features.cpu()

    def _gradients(self, part: range) -> dict[str, Tensor]:
        """The mean gradient of each picture and flip, one a row."""
        flips, items = self.shape[0], len(self.flip)
        means = {
            name: torch.zeros(len(part) * flips, size, dtype=self.model.dtype, device=self.model.device)
            for name, size in self.sizes.items()
        }
        for start in range(0, len(part) * items, self.batch_size):
            flat = torch.arange(start, min(start + self.batch_size, len(part) * items))
            picture, item = flat // items, flat % items
            row = (picture * flips + self.flip[item]).to(self.model.device)
            with torch.enable_grad(), PerSampleGradients(self.model.denoiser, self.names) as tap:
                for name, gradients in tap.per_sample(self.item_losses(part.start + picture, item)):
                    means[name].index_add_(0, row, gradients.flatten(1), alpha=flips / items)
        return means


def project_pictures(
    model: DiffusionModel,
    data: LatentSet,
    grid: LossGrid,
    names: Sequence[str],
    projection: Projection,
    store: Store,
    runner: Runner,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Float[Tensor, "n f d"]:
    """φ of all pictures and their mirror images, kept in the store and found again.

    Args:
        model: The model; `SquareOutput` of it for D-TRAK.
        data: The pictures.
        grid: Where the losses are differentiated.
        names: Parameters.
        projection: P.
        store: Where the features are kept.
        runner: This process's place.
        batch_size: Samples at a time; does not change the result.
        progress: Called with (done, total) chunks.

    Raises:
        ValueError: A gradient is not finite, or a layer has no per-sample gradient.
        StorageError: The store could not be written.
    """
    identity: dict[str, Any] = {
        "model": model.fingerprint(),
        "data": data.fingerprint,
        "dtype": str(model.dtype),
        "weights": sorted(names),
        "projection": projection.identity(),
        **asdict(grid),
    }
    work = run_pass(
        lambda: FeaturePass(model, data, grid, batch_size, names, projection),
        len(data),
        store,
        "projected_gradients",
        identity,
        runner,
        progress=progress,
    )
    return work.losses


def check_ridge(relative: float | None, absolute: float | None) -> None:
    """Refuses a λ before any long work.

    Raises:
        ValueError: λ is not positive, or both or neither are given.
    """
    if (relative is None) == (absolute is None):
        raise ValueError(
            f"Give either a relative or an absolute lambda, the other null; given {relative} and {absolute}."
        )
    value = relative if relative is not None else absolute
    assert value is not None
    if not value > 0:
        raise ValueError(f"lambda must be positive, got {value}: without it the kernel has no inverse.")


class Kernel:
    """x ↦ (ΦᵀΦ + λI)⁻¹ x, with λ relative to the mean diagonal of ΦᵀΦ unless it is given itself.

    Args:
        features: Φ, one training picture a row.
        relative: λ / (tr(ΦᵀΦ) / dimension).
        absolute: λ itself, instead.

    Raises:
        ValueError: λ is not positive, or both or neither are given.
    """

    def __init__(
        self, features: Float[Tensor, "n d"], relative: float | None = 0.01, absolute: float | None = None
    ) -> None:
        check_ridge(relative, absolute)
        gram = features.double().T @ features.double()
        self.ridge = float(gram.diagonal().mean()) * relative if relative is not None else float(absolute or 0.0)
        if not self.ridge > 0:
            raise ValueError("All features are zero, so a relative lambda is zero; check the model's gradients.")
        gram.diagonal().add_(self.ridge)
        self.factor = torch.linalg.cholesky(gram)

    def solve(self, features: Float[Tensor, "q d"]) -> Float[Tensor, "q d"]:
        """(ΦᵀΦ + λI)⁻¹ of each row, in float64."""
        return torch.cholesky_solve(features.double().T, self.factor).T
