"""Estimators of the curvature: each fits what its function fits, and says what that costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.curvature.test_ekfac import DATA, names_of
from tests.support.tiny import one_process, tiny_model
from wherefrom.curvature import (
    EKFAC,
    Curvature,
    DiagonalFisher,
    FisherSettings,
    FitContext,
    Identity,
    fit_diagonal,
    fit_ekfac,
    save_ekfac,
)
from wherefrom.runtime.artifacts import Store

SETTINGS = FisherSettings(samples_per_image=2, seed=3)
KEYS = {"curvature", "fisher", "damping", "fisher_path", "curvature_from"}


def test_they_fit_what_their_functions_fit(tmp_path: Path) -> None:
    model, said = tiny_model(), list[str]()
    names = names_of(model, "cross_attention_kv")
    on = FitContext(model, DATA, names, Store(tmp_path), one_process(), log=said.append)
    gradient = {
        name: torch.ones_like(parameter) for name, parameter in model.denoiser.named_parameters() if name in set(names)
    }
    common = {"data": DATA, "names": names, "store": Store(tmp_path), "runner": one_process(), "settings": SETTINGS}
    diagonal = fit_diagonal(model, **common, damping=0.3)  # type: ignore[arg-type]
    ekfac = fit_ekfac(model, **common, damping=0.2)  # type: ignore[arg-type]
    for estimator, expected in (
        (DiagonalFisher(SETTINGS, 0.3), diagonal.precondition(gradient)),
        (EKFAC(SETTINGS, 0.2), ekfac.precondition(gradient)),
        (Identity(), gradient),
    ):
        step = estimator.matrix(on).precondition(gradient)
        assert all(torch.equal(step[name], expected[name]) for name in names)
    assert len(said) == 2
    assert said[0] == f"diagonal Fisher information of {len(names)} tensors over {len(DATA):,} training images"
    assert said[1].startswith("EK-FAC of ")
    save_ekfac(tmp_path / "saved", ekfac, model)
    loaded = EKFAC(damping=0.2, fisher_path=str(tmp_path / "saved")).matrix(on).precondition(gradient)
    for name in names:
        torch.testing.assert_close(loaded[name], ekfac.precondition(gradient)[name])


def test_the_passes_are_counted() -> None:
    samples = len(DATA) * 2 * 2  # samples per image, flips
    assert DiagonalFisher(SETTINGS).passes(DATA) == 3 * samples
    assert EKFAC(SETTINGS).passes(DATA) == 2 * 3 * samples
    assert Identity().passes(DATA) == Identity(recorded=EKFAC(SETTINGS)).passes(DATA) == 0
    assert EKFAC(SETTINGS, fisher_path="somewhere").passes(DATA) == 0


@pytest.mark.parametrize("estimator", [DiagonalFisher(), EKFAC(layers_per_pass=2), Identity()])
def test_identities_have_the_stored_keys(estimator: Curvature) -> None:
    identity = estimator.identity()
    assert set(identity) == KEYS
    assert identity == {
        "curvature": {"DiagonalFisher": "diagonal", "EKFAC": "ekfac", "Identity": "identity"}[type(estimator).__name__],
        "fisher": {"visits": 5, "seed": 0, "flips": True},
        "damping": 0.1,
        "fisher_path": None,
        "curvature_from": None,
    }


def test_a_curvature_that_is_not_used_is_recorded() -> None:
    set_but_unused = EKFAC(SETTINGS, 0.4, curvature_from="base")
    assert Identity(recorded=set_but_unused).identity() == {**set_but_unused.identity(), "curvature": "identity"}


def test_what_cannot_be_is_refused_before_anything_is_fitted() -> None:
    for form in (DiagonalFisher, EKFAC):
        with pytest.raises(ValueError, match="damping must not be negative; given -1"):
            form(damping=-1.0)
    with pytest.raises(ValueError, match="layers_per_pass must be at least 1; given 0"):
        EKFAC(layers_per_pass=0)
