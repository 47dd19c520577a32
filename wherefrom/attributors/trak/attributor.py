"""TRAK (Park et al. 2023) and D-TRAK (Zheng et al. 2024): projected-gradient attribution."""

from __future__ import annotations

from collections.abc import Sequence

from wherefrom.attributors.trak.base import ProjectedGradients
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.gradients.projection import Projection
from wherefrom.gradients.query_loss import QueryLoss, encode_query
from wherefrom.gradients.score_reduction import Flip
from wherefrom.models.diffusion import DiffusionModel, Output, check_output, with_output
from wherefrom.models.parameter_subsets import Subset
from wherefrom.queries.types import Query
from wherefrom.runtime.distributed import Runner


class TRAK(ProjectedGradients):
    """TRAK (Park et al. 2023): φ(ẑ)ᵀ (ΦᵀΦ + λI)⁻¹ φ(z), φ the projected mean gradient, averaged over an ensemble.

    φ = Pᵀ ∇f is the projected gradient of the output function f, averaged over timesteps and noise; Φ (N × D) holds
    those of the training images. f is the diffusion loss, or with `output: square_output` the mean squared model
    output, for queries and training images alike: D-TRAK (Zheng et al. 2024).

    Args:
        weights: Parameters whose gradients are projected; the papers take all.
        output: f: the loss, or the mean squared output.
        projection: P, the random projection to D dimensions.
        grid: Timesteps and noise samples over which a training image's gradient is averaged.
        noise_samples: Number of (t, ε) samples over which the query's gradient is averaged.
        relative_lambda: λ relative to the mean diagonal of ΦᵀΦ, whose rows are the images without mirror images.
        absolute_lambda: λ itself, instead.
        flip: How the scores of an image and of its mirror image are combined.
        ensemble: Pipelines of further models, trained on the same images with the same autoencoder; scores are
            averaged over all models.
        batch_size: Samples at a time; does not change the result.
        seed: Seed of the query's noise samples.

    Raises:
        ValueError: λ is not positive, both or neither are given, the output is unknown, the projection is too small,
            or a number is not positive.
    """

    def __init__(
        self,
        weights: Subset = "all",
        *,
        output: Output = "loss",
        projection: Projection = Projection(),
        grid: LossGrid = LossGrid(timesteps=10),
        noise_samples: int = 500,
        relative_lambda: float | None = 0.01,
        absolute_lambda: float | None = None,
        flip: Flip = "max",
        ensemble: list[str] | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        check_output(output)
        if noise_samples < 1:
            raise ValueError(f"noise_samples must be at least 1; given {noise_samples}.")
        super().__init__(
            weights,
            projection=projection,
            grid=grid,
            noise_samples=noise_samples,
            relative_lambda=relative_lambda,
            absolute_lambda=absolute_lambda,
            flip=flip,
            ensemble=ensemble,
            batch_size=batch_size,
            seed=seed,
        )
        self.output: Output = output
        self.method = "D-TRAK" if output == "square_output" else "TRAK"

    def differentiated(self, model: DiffusionModel) -> DiffusionModel:
        """The model whose `losses` are f."""
        return with_output(model, self.output)

    def query_steps(self, query: Query) -> Sequence[int]:
        """A single step, whose (t, ε) samples cover all timesteps."""
        return [0]

    def query_loss(self, model: DiffusionModel, query: Query, runner: Runner) -> QueryLoss:
        """The loss of the finished image."""
        return QueryLoss(model, encode_query(model, query), self.seed, runner)
