"""What methods with a curvature share: a curvature of other weights is refused at once, and a killed fit goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.processes import exit_status_of
from tests.support.tiny import one_process, tiny_encoder, tiny_latents, tiny_model
from wherefrom.attributors import AttributionByUnlearning, InfluenceFunction, Query, Scores, TrainingData
from wherefrom.attributors.preconditioned import PreconditionedAttributor
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings
from wherefrom.curvature import (
    EKFAC,
    Curvature,
    DiagonalFisher,
    EKFACMatrix,
    FisherSettings,
    fit_diagonal,
    fit_ekfac,
    save_ekfac,
)
from wherefrom.curvature.ekfac_passes import CovariancePass, EigenvaluePass
from wherefrom.curvature.fisher_samples import SampledPass
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import select_weights
from wherefrom.runtime import dataset_pass
from wherefrom.runtime.artifacts import Store

COUNT = 280  # three chunks
FISHER, GRID = FisherSettings(1), LossGrid(timesteps=1)
QUERY = Query(
    "query",
    "a big red square",
    np.zeros((8, 8, 3), dtype=np.uint8),
    torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
)


def curvature_of_keys_and_values(root: Path, model: DiffusionModel, form: type[Curvature]) -> Path:
    """The folder of a curvature of another choice of weights."""
    names, data = list(select_weights(model.denoiser, "cross_attention_kv")), tiny_latents(3)
    if form is EKFAC:
        save_ekfac(
            root / "saved",
            fit_ekfac(model, data=data, names=names, store=Store(root), runner=one_process(), settings=FISHER),
            model,
        )
        return root / "saved"
    fit_diagonal(model, data=data, names=names, store=Store(root), runner=one_process(), settings=FISHER)
    (folder,) = (root / "fisher").iterdir()
    return folder


@pytest.mark.parametrize("form", [DiagonalFisher, EKFAC])
@pytest.mark.parametrize("method", [AttributionByUnlearning, InfluenceFunction])
def test_a_curvature_of_other_weights_is_refused_before_anything_is_measured(
    tmp_path: Path,
    form: type[DiagonalFisher],
    method: Callable[..., PreconditionedAttributor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = tiny_model(encoder=tiny_encoder(tmp_path / "text")), tiny_latents(3)
    folder = curvature_of_keys_and_values(tmp_path, model, form)
    training, fitted = TrainingData(data.images, data), tmp_path / "fitted"
    method("cross_attention_kv", grid=GRID, curvature=form(fisher_path=str(folder))).fit(
        training, model, Store(fitted), one_process()
    )
    monkeypatch.setattr(model, "losses", None)  # whatever takes long needs them
    wrong = method("cross_attention", grid=GRID, curvature=form(fisher_path=str(folder)))
    message = rf"{folder} was made for other weights: .* lacks 21, in .*attn2\.to_q, .*attn2\.to_out\.0, .* and 9 more"
    with pytest.raises(ValueError, match=message):
        wrong.fit(training, model, Store(tmp_path / "never"), one_process())
    assert not (tmp_path / "never").exists()


def abu_plus(root: Path, store: Path) -> tuple[PreconditionedAttributor, Scores]:
    """AbU+ of one query, from the curvature to the scores."""
    model, data = tiny_model(encoder=tiny_encoder(root / "text")), tiny_latents(COUNT)
    method = AttributionByUnlearning(
        "cross_attention",
        unlearning=UnlearningSettings(noise_samples=16, measurement_samples=16, relative_loss_increase=0.01),
        grid=GRID,
        curvature=EKFAC(FISHER),
    )
    method.fit(TrainingData(data.images, data), model, Store(store), one_process())
    (scores,) = method.score([QUERY])
    return method, scores


def stop_at(kind: type[SampledPass], position: int, how: Callable[[], None]) -> None:
    """Makes a pass stop at the chunk that begins there, the chunks before it being kept."""
    dataset_pass._SAVE_EVERY_S = 0.0
    step = SampledPass.step

    def stopping(self: SampledPass, positions: range) -> None:
        if isinstance(self, kind) and positions.start == position:
            how()
        step(self, positions)

    SampledPass.step = stopping  # type: ignore[method-assign]


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def abu_plus_until_killed(root: Path, store: Path) -> None:
    """AbU+, killed in the middle of the eigenvalues."""
    stop_at(EigenvaluePass, 128, kill_this_process)
    abu_plus(root, store)


def killed(root: Path, store: Path) -> None:
    """Runs AbU+ in a process of its own, which is killed in the middle of the eigenvalues."""
    assert exit_status_of(abu_plus_until_killed, root, store) == -signal.SIGKILL


def stopped() -> None:
    raise KeyboardInterrupt


def test_abu_plus_goes_on_where_it_was_stopped_and_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_pass, "_SAVE_EVERY_S", dataset_pass._SAVE_EVERY_S)
    expected, scores = abu_plus(tmp_path, tmp_path / "at once")
    store = tmp_path / "in parts"
    with monkeypatch.context() as patch:
        patch.setattr(SampledPass, "step", SampledPass.step)
        stop_at(CovariancePass, 256, stopped)
        with pytest.raises(KeyboardInterrupt):
            abu_plus(tmp_path, store)
    killed(tmp_path, store)
    seen: list[tuple[type, int]] = []
    step = SampledPass.step

    def counted(self: SampledPass, positions: range) -> None:
        if len(positions) > 16:  # a small batch is only timed, for the plan
            seen.append((type(self), positions.start))
        step(self, positions)

    monkeypatch.setattr(SampledPass, "step", counted)
    result, again = abu_plus(tmp_path, store)
    assert seen == [(EigenvaluePass, 128), (EigenvaluePass, 256)]
    assert isinstance(result.curvature_matrix, EKFACMatrix)
    assert isinstance(expected.curvature_matrix, EKFACMatrix)
    assert result.curvature_matrix.samples == COUNT * FISHER.per_image
    for name, factors in expected.curvature_matrix.layers.items():
        torch.testing.assert_close(
            result.curvature_matrix.layers[name].eigenvalues, factors.eigenvalues, rtol=1e-9, atol=1e-18
        )
    assert float(scores.scores.std()) > 1e-5
    np.testing.assert_allclose(again.scores, scores.scores, rtol=1e-8, atol=1e-11)
