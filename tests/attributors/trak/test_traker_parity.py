"""Our TRAK scores equal traker's up to one positive factor, with the same matrix P in both."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.tiny import one_process, tiny_latents, tiny_model
from wherefrom.attributors import JourneyTRAK, TrainingData
from wherefrom.gradients.loss_grid import LossSamples
from wherefrom.gradients.projection import Projection
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import select_weights
from wherefrom.runtime.artifacts import Store

pytest.importorskip("trak", reason="traker is in the extra `dev`")

from trak import TRAKer
from trak.projectors import AbstractProjector

from benchmarks.trak import Case, DiffusionLoss

TRAIN, HELD_OUT = tiny_latents(40), tiny_latents(6, seed=1)
P, RIDGE = Projection(128), 0.05  # traker 0.3.2 fails for 100 and fewer numbers on a processor


class SameMatrix(AbstractProjector):
    """The whole of our P, in memory."""

    def __init__(self, model: DiffusionModel) -> None:
        sizes = {name: weight.numel() for name, weight in select_weights(model.denoiser, "all").items()}
        super().__init__(sum(sizes.values()), P.dimension, P.seed, "rademacher", "cpu")
        rows = [
            P.rows(name, start=0, stop=size, device=torch.device("cpu"), dtype=torch.float64)
            for name, size in sizes.items()
        ]
        self.matrix = torch.cat(rows)

    def project(self, grads: dict[str, Tensor], model_id: int) -> Tensor:
        return torch.cat([gradient.flatten(1) for gradient in grads.values()], dim=1).detach() @ self.matrix


def traker_scores(model: DiffusionModel, ridge: float, folder: Path) -> np.ndarray:
    """Scores of the training images (columns) for each held-out one (rows)."""
    cases = [Case(model, data, P, 16, 8) for data in (TRAIN, HELD_OUT)]
    projector, denoiser = SameMatrix(model), cases[0].for_vmap()
    # It divides gradients by √weights, where we divide P by √dimension: its λ is in its own units.
    made = TRAKer(
        denoiser,
        DiffusionLoss(),
        len(TRAIN),
        str(folder),
        device="cpu",
        projector=projector,
        use_half_precision=False,
        logging_level=logging.ERROR,
        lambda_reg=ridge * P.dimension / projector.grad_dim,
    )
    made.load_checkpoint(denoiser.state_dict(), model_id=0)
    for batch in cases[0].batches:
        made.featurize(batch, num_samples=len(batch[0]))
    made.finalize_features()
    made.start_scoring_checkpoint("held_out", denoiser.state_dict(), model_id=0, num_targets=len(HELD_OUT))
    for batch in cases[1].batches:
        made.score(batch, num_samples=len(batch[0]))
    scores: np.ndarray = np.array(made.finalize_scores("held_out")).T
    return scores


def test_scores_are_traker_s_up_to_one_positive_factor(tmp_path: Path) -> None:
    model = tiny_model()
    attributor = JourneyTRAK(
        projection=P, grid=LossSamples(noise_samples=1, flips=False), relative_lambda=RIDGE, absolute_lambda=None
    )
    data = TrainingData(TRAIN.images, TRAIN, HELD_OUT.images, HELD_OUT)
    attributor.fit(data, model, Store(tmp_path / "store"), one_process())
    (kernel,) = attributor.kernels
    ours = attributor.products(attributor.features, [kernel.solve(attributor.null[0].values[:, 0])])
    theirs = traker_scores(model, kernel.ridge, tmp_path / "traker")
    assert ours.shape == theirs.shape == (len(HELD_OUT), len(TRAIN))
    factor = float((ours * theirs).sum() / (ours * ours).sum())
    assert factor > 0
    # Gradients and projections are in float64 on both sides; traker keeps them and inverts in float32.
    np.testing.assert_allclose(theirs, factor * ours, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    other = traker_scores(model, 10 * kernel.ridge, tmp_path / "other")
    factor = float((ours * other).sum() / (ours * ours).sum())
    assert np.abs(other - factor * ours).max() > 0.01 * np.abs(other).max(), "another λ gives other scores"
