"""Bank (store) of training gradients: the training side of influence functions, computed once for all queries.

Influence is ∇L(ẑ)ᵀ F⁻¹ ∇L(z), so with both sides multiplied by F^(-1/2) it is an inner product. A `Bank`
stores each training image's whitened gradient, averaged over captions, timesteps and noise samples and compressed; a
query then costs its own gradient and one matrix product. With `keep: factors`, a `TokenBank` stores exact factors of
the gradients instead, not whitened, and F⁻¹ is applied to the query's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from wherefrom.attributors.influence.token_factors import TokenBank, TokenGradients, layers_of
from wherefrom.attributors.trak.projected_features import Compress, ImageFeatures
from wherefrom.curvature.base import CurvatureMatrix
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossGrid, LossPass
from wherefrom.gradients.per_sample import PerSampleGradients
from wherefrom.gradients.projection import Projection
from wherefrom.models.conditioning import PROMPT
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime.artifacts import Identity, Store
from wherefrom.runtime.console import Progress
from wherefrom.runtime.dataset_pass import run_pass
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.row_cache import Rows, make_rows
from wherefrom.runtime.stable_names import settings_identity

Keep = Literal["factors", "eigenbasis", "rademacher", "sparse"]
_REFERENCE_IMAGES = 256  # training images that coordinates and timestep weights are chosen from
_ROWS_AT_A_TIME = 4096  # rows of a bank in memory at a time: the whole bank may not fit
_COORDINATES = "coordinates/"  # prefix of a parameter's name in the state dict of a pass


@dataclass(frozen=True)
class Compression:
    """How a training gradient is compressed to a row of the bank.

    Attributes:
        keep: `factors` is exact, for linear layers whose inputs are the prompt embeddings (cross-attention keys and
            values): it stores the output gradient at each token (tokens × outputs numbers) instead of the weight
            gradient (outputs × inputs), see `wherefrom.attributors.influence.token_factors`. The others are lossy and
            work for any weights: `eigenbasis` keeps the `dimension` coordinates of the whitened gradient with the
            largest mean square over a sample of training images (whitening makes these nearly equal, so that few
            coordinates hold little of the score); `rademacher` and `sparse` are random projections, see `Projection`.
        dimension: Numbers in a row; not for factors. None keeps all coordinates of the eigenbasis.
        seed: Seed of the random projection.

    Raises:
        ValueError: The dimension is not positive, missing for a projection or given for factors; or the kind is
            unknown.
    """

    keep: Keep = "factors"
    dimension: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep not in ("factors", "eigenbasis", "rademacher", "sparse"):
            raise ValueError(
                f"Unknown compression {self.keep!r}; choose 'factors', 'eigenbasis', 'rademacher' or 'sparse'."
            )
        if self.keep == "factors" and self.dimension is not None:
            raise ValueError("Factors have no dimension to choose: their size is that of captions and layers.")
        if self.dimension is None and self.keep in ("rademacher", "sparse"):
            raise ValueError(f"A {self.keep} projection needs a dimension.")
        if self.dimension is not None and self.dimension < 1:
            raise ValueError(f"A bank's rows need at least 1 number; given dimension {self.dimension}.")

    def identity(self) -> dict[str, Any]:
        """The settings that decide the rows."""
        if self.keep in ("factors", "eigenbasis"):
            return {"keep": self.keep, "dimension": self.dimension}
        return {"keep": self.keep, "dimension": self.dimension, "projection": self.projection().identity()}

    def projection(self) -> Projection:
        """The random projection, where one is asked for."""
        assert self.dimension is not None
        assert self.keep in ("rademacher", "sparse")
        return Projection(self.dimension, self.seed, self.keep)


class SquaredPass(LossPass):
    """Squares of per-sample whitened gradients g̃ = F^(-1/2) ∇l, summed in two ways (a `TrainingPass`).

    `losses` holds |g̃|² of every sample, of shape (N, F, K, T, R); `coordinates` holds Σ_samples g̃² of every
    coordinate, by parameter name, each sample counted as often as training sees its image.

    Args:
        model: The model.
        data: The images.
        grid: Timesteps and noise samples; without mirror images.
        batch_size: Samples at a time.
        names: Parameters.
        curvature: F, fitted.
    """

    def __init__(
        self,
        model: DiffusionModel,
        *,
        data: EncodedImages,
        grid: LossGrid,
        batch_size: int,
        names: Sequence[str],
        curvature: CurvatureMatrix,
    ) -> None:
        super().__init__(model, data, grid, batch_size)
        self.names, self.curvature = list(names), curvature
        self.coordinates: dict[str, Tensor] = {}

    def _measure(self, image: Tensor, item: Tensor) -> Tensor:
        with torch.enable_grad(), PerSampleGradients(self.model.denoiser, self.names) as tap:
            rows = {name: each.flatten(1) for name, each in tap.per_sample(self.item_losses(image, item))}
        weights = self.data.weights
        total = torch.zeros(len(item), dtype=self.losses.dtype)
        for name, white in self.curvature.whiten(rows).items():
            squares = white.square()
            total += squares.sum(dim=1).cpu()
            if weights is not None:
                squares = squares * weights[image].to(squares)[:, None]
            sums = squares.sum(dim=0).double().cpu()
            self.coordinates[name] = self.coordinates[name] + sums if name in self.coordinates else sums
        return total

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Adds the sums of another process or of an earlier run."""
        super().merge(state)
        for name, value in state.items():
            if name.startswith(_COORDINATES):
                key = name.removeprefix(_COORDINATES)
                self.coordinates[key] = self.coordinates[key] + value if key in self.coordinates else value

    def state_dict(self) -> dict[str, Tensor]:
        """The sums so far."""
        return {**super().state_dict(), **{_COORDINATES + name: each for name, each in self.coordinates.items()}}


@dataclass(frozen=True)
class Bank:
    """Whitened, compressed gradients of images, and the same map for a query's gradient.

    Attributes:
        rows: Whitened, compressed gradients, shape (N, F, D).
        compress: Whitens and compresses gradients, (B, n) by parameter name, to rows (B, D).
    """

    rows: Rows
    compress: Compress

    def influence(self, gradients: Mapping[str, Float[Tensor, "..."]]) -> Float[Tensor, "n f"]:
        """∇L(ẑ)ᵀ F⁻¹ ∇L(z) of every image and mirror image.

        Args:
            gradients: The query's, by parameter name.
        """
        row = self.compress({name: value.flatten()[None] for name, value in gradients.items()})[0].cpu()
        values = self.rows.values
        dtype = torch.promote_types(values.dtype, torch.float32)  # half precision is for storage only
        blocks = (values[start : start + _ROWS_AT_A_TIME] for start in range(0, len(values), _ROWS_AT_A_TIME))
        return torch.cat([block.to(dtype) @ row.to(dtype) for block in blocks]).double()


class BankBuilder:
    """Builds banks: of the training set, and of held-out images.

    Args:
        model: The model.
        training: Its training set, a sample of which decides coordinates and timestep weights.
        grid: Timesteps and noise samples at which losses are differentiated.
        names: Parameters.
        curvature: F, fitted.
        curvature_identity: The settings that decide F.
        compression: How rows are compressed.
        spread: Divide each timestep's gradients by their root mean square length after whitening, so that no timestep
            dominates the others; else the plain mean.
        half: Store rows in float16.
        store: Cache of finished banks.
        runner: Rank and world size of this process.
        batch_size: Samples at a time; does not change the result.
        progress: Called with (done, total) chunks.

    Raises:
        ValueError: A layer has no per-sample gradient, or a gradient is not finite.
        StorageError: The store could not be written.
    """

    def __init__(
        self,
        model: DiffusionModel,
        *,
        training: EncodedImages,
        grid: LossGrid,
        names: Sequence[str],
        curvature: CurvatureMatrix,
        curvature_identity: Identity,
        compression: Compression,
        spread: bool,
        half: bool,
        store: Store,
        runner: Runner,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> None:
        if compression.keep == "factors":
            layers_of(model.denoiser, names)
        self.model, self.grid, self.names, self.curvature = model, grid, list(names), curvature
        self.compression = compression
        self.half, self.store, self.runner = half, store, runner
        self.batch_size, self.progress = batch_size, progress
        self.settings: dict[str, Any] = {
            "model": model.fingerprint(),
            "dtype": str(model.dtype),
            "weights": sorted(names),
            "curvature": dict(curvature_identity),
            "of": training.weighted_fingerprint,
        }
        chosen = compression.keep == "eigenbasis"
        squares = self._squared_gradients(training) if spread or chosen else None
        self.timestep_weights = None if squares is None or not spread else _timestep_weights(squares)
        self.compress: Compress | None = None
        if squares is not None and chosen:
            self.compress = self._select_coordinates(largest(squares.coordinates, compression.dimension))
        elif compression.keep != "factors":
            self.compress = self._project(compression.projection())
        self.identity = {
            **self.settings,
            "compression": compression.identity(),
            "spread": spread,
            "half": half,
            "losses": settings_identity(grid),
        }

    def _squared_gradients(self, training: EncodedImages) -> SquaredPass:
        sample = training.subset(training.sample(_REFERENCE_IMAGES))
        grid = LossGrid(self.grid.timesteps, 1, self.grid.seed, False, self.grid.offset)
        return run_pass(
            lambda: SquaredPass(
                self.model,
                data=sample,
                grid=grid,
                batch_size=self.batch_size,
                names=self.names,
                curvature=self.curvature,
            ),
            count=len(sample),
            store=self.store,
            kind="whitened_squares",
            identity={**self.settings, "losses": settings_identity(grid), "sample": sample.fingerprint},
            runner=self.runner,
            progress=self.progress,
        )

    def _project(self, projection: Projection) -> Compress:
        def project(gradients: Mapping[str, Tensor]) -> Tensor:
            return projection.project(self.curvature.whiten(gradients)).to(self._dtype)

        return project

    def _select_coordinates(self, kept: Mapping[str, Int64[Tensor, " k"]]) -> Compress:
        def select(gradients: Mapping[str, Tensor]) -> Tensor:
            white = self.curvature.whiten(gradients)
            parts = [white[name][:, where.to(white[name].device)] for name, where in kept.items()]
            return torch.cat(parts, dim=1).to(self._dtype)

        return select

    def size(self, data: EncodedImages) -> int:
        """Bytes of the bank of these images."""
        shapes = {name: parameter.shape for name, parameter in self.model.denoiser.named_parameters()}
        if self.compression.keep == "factors":
            captions, tokens = data.captions_per_image, data.empty[PROMPT].shape[0]
            width = 1 + captions * tokens * sum(shapes[name][0] for name in self.names)
        else:
            width = self.compression.dimension or sum(shapes[name].numel() for name in self.names)
        return len(data) * (2 if self.grid.flips else 1) * width * self._dtype.itemsize

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float16 if self.half else torch.promote_types(self.model.dtype, torch.float32)

    def build(self, data: EncodedImages) -> Bank | TokenBank:
        """The bank of these images, from the store if it is there."""
        losses = LossPass(self.model, data, self.grid, self.batch_size)
        weights = self.timestep_weights
        if weights is not None:
            weights = weights[torch.searchsorted(self.grid.steps(self.model.noise_schedule.steps), losses.timestep)]
        if self.compress is None:
            rows = self._rows(TokenGradients(losses, self.names, weights, self.half).rows, data)
            return TokenBank(rows, data, tuple(self.names), self.curvature)
        return Bank(self._rows(ImageFeatures(losses, self.names, self.compress, weights).rows, data), self.compress)

    def _rows(self, compute: Callable[[range], Tensor], data: EncodedImages) -> Rows:
        return make_rows(
            compute,
            ids=data.ids,
            store=self.store,
            kind="bank",
            identity={**self.identity, "data": data.fingerprint},
            runner=self.runner,
            progress=self.progress,
        )


def _timestep_weights(squares: SquaredPass) -> Float[Tensor, " t"] | None:
    """Timestep weights ∝ 1 / RMS norm of the whitened gradients, of mean 1; None where a norm is zero."""
    # The losses' dimensions are images, flips, captions, timesteps and noise samples.
    repeats = squares.data.weights
    if repeats is None:
        lengths = squares.losses.double().mean(dim=(0, 1, 2, 4)).sqrt()
    else:
        lengths = (repeats @ squares.losses.double().mean(dim=(1, 2, 4)) / repeats.sum()).sqrt()
    if not bool((lengths > 0).all()):
        return None
    weights: Tensor = 1 / lengths
    return weights / weights.mean()


def largest(coordinates: Mapping[str, Float[Tensor, " m"]], count: int | None) -> dict[str, Int64[Tensor, " k"]]:
    """Positions of the `count` largest values over all tensors together, by tensor; ties by name and position.

    Args:
        coordinates: Values by parameter name.
        count: Number of positions; None, or more than there are, is all.
    """
    names = sorted(coordinates)
    flat = torch.cat([coordinates[name] for name in names])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[torch.argsort(flat, descending=True, stable=True)[: len(flat) if count is None else count]] = True
    parts = chosen.split([len(coordinates[name]) for name in names])
    return {name: part.nonzero()[:, 0] for name, part in zip(names, parts, strict=True)}
