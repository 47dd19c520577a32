"""Curvature of a training set with repeats is that of the set in which each image physically occurs so often."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.repeats import with_repeats, written_out
from tests.support.tiny import one_process, tiny_latents, tiny_model
from wherefrom.curvature import FisherSettings, fit_diagonal, fit_ekfac
from wherefrom.curvature.ekfac_passes import CovariancePass
from wherefrom.curvature.kronecker import plan_layers
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import select_weights
from wherefrom.runtime.artifacts import Store

REPEATS = (3, 1, 2, 1, 4)
DATA = tiny_latents(len(REPEATS), captions=2)
WEIGHTED, COPIES = with_repeats(DATA, REPEATS), written_out(DATA, REPEATS)
FISHER = FisherSettings(2)


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return tiny_model()


def names(model: DiffusionModel) -> list[str]:
    return list(select_weights(model.denoiser, "all"))


def test_the_diagonal_is_that_of_the_copies(model: DiffusionModel, tmp_path: Path) -> None:
    weighted, copies, plain = (
        fit_diagonal(
            model, data=data, names=names(model), store=Store(tmp_path), runner=one_process(), settings=FISHER
        ).fisher
        for data in (WEIGHTED, COPIES, DATA)  # in one store: repeats are another identity
    )
    for name, values in copies.items():
        torch.testing.assert_close(weighted[name], values, rtol=1e-9, atol=1e-24)
    assert any(not torch.allclose(plain[name], values, rtol=0.02) for name, values in copies.items())


def test_covariances_weigh_inputs_too(model: DiffusionModel) -> None:
    result = []
    for data in (WEIGHTED, COPIES):
        work = CovariancePass(model, data, plan_layers(model, data, names(model)), FISHER, 7)
        work.step(range(2))
        work.step(range(2, len(data)))
        assert work.samples == sum(REPEATS) * FISHER.per_image
        result.append(work.covariances())
    for name, values in result[1].items():
        torch.testing.assert_close(result[0][name], values, rtol=1e-9, atol=1e-12 * float(values.abs().max()))
    assert any(name.startswith("A/") for name in result[0])


def test_ekfac_preconditions_as_that_of_the_copies(model: DiffusionModel, tmp_path: Path) -> None:
    weighted, copies, plain = (
        fit_ekfac(model, data=data, names=names(model), store=Store(tmp_path), runner=one_process(), settings=FISHER)
        for data in (WEIGHTED, COPIES, DATA)
    )
    random = torch.Generator().manual_seed(0)
    gradients = {
        name: torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        for name, parameter in select_weights(model.denoiser, "all").items()
    }
    steps = [matrix.precondition(gradients) for matrix in (weighted, copies, plain)]
    for name, step in steps[1].items():
        torch.testing.assert_close(steps[0][name], step, rtol=1e-6, atol=1e-7 * float(step.abs().max()))
    assert weighted.samples == sum(REPEATS) * FISHER.per_image  # what kronfluence's files hold beside the sums
    assert not torch.allclose(steps[2]["conv_in.weight"], steps[1]["conv_in.weight"], rtol=0.01)
