"""EK-FAC against kronfluence 1.0.1 in float64: the same matrices, the same steps, and files that both read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from kronfluence.analyzer import Analyzer
from kronfluence.arguments import ScoreArguments
from kronfluence.factor.config import FactorConfig
from kronfluence.factor.covariance import load_covariance_matrices
from kronfluence.factor.eigen import load_lambda_matrices
from torch import Tensor, nn

from benchmarks.curvature import Case
from tests.support.curvature import assert_close
from tests.support.tiny import tiny_latents, tiny_model
from wherefrom.curvature import EKFACMatrix, FisherSettings, load_ekfac, save_ekfac
from wherefrom.curvature.ekfac_passes import CovariancePass

pytestmark = [
    # kronfluence 1.0.1 calls torch by a name that is on its way out.
    pytest.mark.filterwarnings(r"ignore:`torch\.cuda\.amp\.GradScaler\(args\.\.\.\)` is deprecated:FutureWarning"),
]
SETTINGS = FisherSettings(samples_per_image=2, seed=3)


class Fits(NamedTuple):
    """Both fits of one model."""

    case: Case
    ours: EKFACMatrix
    theirs: Path


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    case = Case(tiny_model(), tiny_latents(4, captions=2), "all", SETTINGS, batch_size=5)
    return Fits(case, case.ours(), case.kronfluence(tmp_path_factory.mktemp("theirs"), torch.float64))


def a_gradient(case: Case) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    parameters = dict(case.model.denoiser.named_parameters())
    return {name: torch.randn(parameters[name].shape, generator=random, dtype=torch.float64) for name in case.names}


def test_the_layers_are_of_every_kind(fits: Fits) -> None:
    modules = [fits.case.model.denoiser.get_submodule(layer.module) for layer in fits.case.plan.layers]
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    assert {module.stride for module in convolutions} == {(1, 1), (2, 2)}
    assert {module.kernel_size for module in convolutions} == {(1, 1), (3, 3)}
    assert {layer.bias for layer in fits.case.plan.layers if layer.places == 1} == {True, False}
    assert max(layer.sharers for layer in fits.case.plan.layers) > 3


def test_the_covariances_are_those_of_kronfluence(fits: Fits) -> None:
    case = fits.case
    work = CovariancePass(case.model, case.data, case.plan, SETTINGS, 64)
    work.step(range(len(case.data)))
    ours, theirs = work.covariances(), load_covariance_matrices(fits.theirs)
    for layer in case.plan.layers:
        for result, name in (
            (f"A/{layer.source}", "activation_covariance"),
            (f"G/{layer.module}", "gradient_covariance"),
        ):
            expected = theirs[name][layer.module]
            error = float((ours[result] - expected).abs().max())
            assert error <= 1e-10 * float(expected.abs().max()), f"{name} of {layer.module}"


def test_factors_of_kronfluence_load_and_give_our_steps(fits: Fits) -> None:
    loaded = load_ekfac(fits.theirs, fits.case.model, curvature_from="undeclared")
    assert loaded.samples == fits.ours.samples == fits.case.samples
    gradient = a_gradient(fits.case)
    assert_close(loaded.precondition(gradient), fits.ours.precondition(gradient), 1e-6)


def steps_of_kronfluence(
    factors: Mapping[str, Mapping[str, Tensor]], gradient: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What kronfluence itself makes of a gradient with these factors, damped as it does without a number."""
    ekfac, steps = FactorConfig.CONFIGS["ekfac"], {}
    arguments = ScoreArguments(damping_factor=None, precondition_dtype=torch.float64)
    for name, total in factors["lambda_matrix"].items():
        weight, bias = gradient[f"{name}.weight"], gradient.get(f"{name}.bias")
        storage: dict[str, Any] = {kind: values[name].clone() for kind, values in factors.items()}
        ekfac.prepare(storage, arguments, torch.device("cpu"))
        matrix = weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], dim=1)
        assert matrix.shape == total.shape
        step = ekfac.precondition_gradient(matrix[None], storage)[0]
        steps[f"{name}.weight"] = step[:, : weight[0].numel()].reshape(weight.shape)
        if bias is not None:
            steps[f"{name}.bias"] = step[:, -1]
    return steps


def test_our_files_give_our_steps_in_kronfluence(fits: Fits, tmp_path: Path) -> None:
    save_ekfac(tmp_path, fits.ours, fits.case.model)
    factors = load_lambda_matrices(tmp_path)
    for name in ("activation_eigenvectors", "gradient_eigenvectors"):
        factors[name] = Analyzer.load_file(tmp_path / f"{name}.safetensors")
    gradient = a_gradient(fits.case)
    result = steps_of_kronfluence(factors, gradient)
    assert_close({name: result[name] for name in gradient}, fits.ours.precondition(gradient), 1e-9)
