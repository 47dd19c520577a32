"""Projected gradients φ(z) = Pᵀ ∇L(z) of images, and the kernel (ΦᵀΦ + λI)⁻¹ of TRAK and D-TRAK."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossGrid, LossPass, LossSamples
from wherefrom.gradients.per_sample import PerSampleGradients
from wherefrom.gradients.projection import Projection
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Progress
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.row_cache import Rows, make_rows
from wherefrom.runtime.stable_names import bare_name, settings_identity

_GRADIENT_BYTES = 2**30  # memory for gradients that wait for projection
SMALLEST_DIMENSION = 100
_ROWS_AT_A_TIME = 4096  # rows of features that are converted to float64 at a time


Compress = Callable[[Mapping[str, Float[Tensor, "b n"]]], Float[Tensor, "b d"]]


class ImageFeatures:
    """Mean gradients over captions, timesteps and noise samples, compressed, of images and their mirror images.

    Args:
        losses: The losses that are differentiated, and their grid.
        names: Parameters.
        compress: Maps flattened gradients, (B, n) by parameter name, to features (B, D).
        weights: Weight in the mean of each grid item (flip, caption, timestep, noise sample); None weights all equally.

    Raises:
        ValueError: A layer has no per-sample gradient.
    """

    def __init__(
        self,
        losses: LossPass,
        names: Sequence[str],
        compress: Compress,
        weights: Float[Tensor, " items"] | None = None,
    ) -> None:
        self.losses, self.names, self.compress, self.weights = losses, list(names), compress, weights
        self.model, self.flips = losses.model, losses.shape[0]
        shapes = {name: parameter.shape for name, parameter in self.model.denoiser.named_parameters()}
        self.sizes = {name: shapes[name].numel() for name in self.names}
        self.dtype = torch.promote_types(self.model.dtype, torch.float32)
        PerSampleGradients(self.model.denoiser, self.names)

    def rows(self, positions: range) -> Float[Tensor, "b f d"]:
        """The features of the images at these positions.

        Raises:
            ValueError: A gradient is not finite.
        """
        image_bytes = self.flips * sum(self.sizes.values()) * self.dtype.itemsize
        parts = -(-len(positions) // max(1, _GRADIENT_BYTES // image_bytes))
        size = -(-len(positions) // parts)  # equal parts: P is generated once for each part
        done = [self._part(positions[start : start + size]) for start in range(0, len(positions), size)]
        return torch.cat(done)

    def _part(self, part: range) -> Tensor:
        features = self.compress(self.gradients(part)).reshape(len(part), self.flips, -1)
        self.losses.check_finite("gradient", part, features, "the model's weights")
        return features.cpu()

    def gradients(self, part: range) -> dict[str, Tensor]:
        """The mean gradient of each image and flip, one a row."""
        items, device = len(self.losses.flip), self.model.device
        means = {
            name: torch.zeros(len(part) * self.flips, size, dtype=self.dtype, device=device)
            for name, size in self.sizes.items()
        }
        for image, item in self.losses.batches(part):
            row = ((image - part.start) * self.flips + self.losses.flip[item]).to(device)
            with torch.enable_grad(), PerSampleGradients(self.model.denoiser, self.names) as tap:
                losses = self.losses.item_losses(image, item)
                if self.weights is not None:
                    losses = losses * self.weights[item].to(losses)
                for name, gradients in tap.per_sample(losses):
                    means[name].index_add_(0, row, gradients.flatten(1).to(self.dtype), alpha=self.flips / items)
        return means


def project_images(
    model: DiffusionModel,
    *,
    data: EncodedImages,
    grid: LossGrid | LossSamples,
    names: Sequence[str],
    projection: Projection,
    store: Store,
    runner: Runner,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Rows:
    """φ of all images and their mirror images, shape (N, F, D), kept in the store by id and found again.

    Args:
        model: The model; for D-TRAK, `with_output(model, "square_output")`.
        data: The images.
        grid: Timesteps and noise samples at which the losses are differentiated.
        names: Parameters.
        projection: P.
        store: Cache of finished features.
        runner: Rank and world size of this process.
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
        "losses": [bare_name(type(grid)), settings_identity(grid)],
    }
    features = ImageFeatures(grid.of(model, data, batch_size), names, projection.project)
    return make_rows(
        features.rows,
        ids=data.ids,
        store=store,
        kind="projected_gradients",
        identity=identity,
        runner=runner,
        progress=progress,
    )


def project_each(
    projection: Projection, gradients: Iterable[Mapping[str, Float[Tensor, "..."]]]
) -> Float[Tensor, "n d"]:
    """Pᵀg of a stream of gradients, projected as many at a time as memory allows."""
    rows: list[Tensor] = []
    held: list[Mapping[str, Tensor]] = []

    def project() -> None:
        if held:
            rows.append(projection.project({name: torch.stack([each[name] for each in held]) for name in held[0]}))
            held.clear()

    for gradient in gradients:
        held.append(gradient)
        # Twice, because `torch.stack` copies all of them.
        if 2 * len(held) * sum(value.nbytes for value in gradient.values()) > _GRADIENT_BYTES:
            project()
    project()
    return torch.cat(rows)


def check_projection(projection: Projection) -> None:
    """Raises for a projection of too few dimensions, before any long computation.

    An inner product xᵀy of projected vectors scatters by about |x||y| / √dimension (Johnson and Lindenstrauss 1984; for
    signs exactly, see Achlioptas 2003): below 100 dimensions unrelated gradients have cosines beyond ±0.1, as large as
    those of related ones.

    Raises:
        ValueError: Its dimension is less than 100.
    """
    if projection.dimension < SMALLEST_DIMENSION:
        raise ValueError(
            f"A projection to {projection.dimension} numbers is too small: it adds noise of "
            f"{projection.dimension**-0.5:.0%} to every cosine between gradients. Choose at least "
            f"{SMALLEST_DIMENSION}; the papers take 2,048 to 32,768."
        )


def check_ridge(relative: float | None, absolute: float | None) -> None:
    """Raises for an invalid λ, before any long computation.

    Raises:
        ValueError: λ is not positive, or both or neither are given.
    """
    if (relative is None) == (absolute is None):
        raise ValueError(
            f"Give either a relative or an absolute lambda, the other null; given {relative} and {absolute}."
        )
    value = relative if relative is not None else absolute
    assert value is not None
    if not 0 < value < math.inf:
        raise ValueError(f"lambda must be positive, got {value}: without it the kernel has no inverse.")


def in_double(features: Float[Tensor, "n ..."]) -> Iterator[Float[Tensor, "b ..."]]:
    """Blocks of rows in float64: the whole matrix may not fit in memory."""
    for start in range(0, len(features), _ROWS_AT_A_TIME):
        yield features[start : start + _ROWS_AT_A_TIME].double()


class Kernel:
    """x ↦ (ΦᵀWΦ + λI)⁻¹ x, with λ relative to the mean diagonal of ΦᵀWΦ unless it is given itself.

    Args:
        features: Φ, one training image a row.
        relative: λ / (tr(ΦᵀWΦ) / dimension).
        absolute: λ itself, instead.
        weights: Diagonal of W, how often training sees each image; None is I.

    Raises:
        ValueError: λ is not positive, or both or neither are given.
    """

    def __init__(
        self,
        features: Float[Tensor, "n d"],
        relative: float | None = 0.01,
        absolute: float | None = None,
        weights: Float[Tensor, " n"] | None = None,
    ) -> None:
        check_ridge(relative, absolute)
        gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
        start = 0
        for block in in_double(features):
            stop = start + len(block)
            gram.addmm_(block.T, block if weights is None else block * weights[start:stop, None])
            start = stop
        self.ridge = float(gram.diagonal().mean()) * relative if relative is not None else float(absolute or 0.0)
        if not self.ridge > 0:
            raise ValueError("All features are zero, so a relative lambda is zero; check the model's gradients.")
        gram.diagonal().add_(self.ridge)
        self.factor = torch.linalg.cholesky(gram)

    def solve(self, features: Float[Tensor, "q d"]) -> Float[Tensor, "q d"]:
        """(ΦᵀWΦ + λI)⁻¹ of each row, in float64."""
        return torch.cholesky_solve(features.double().T, self.factor).T
