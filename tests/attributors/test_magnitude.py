"""Scores without their signs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.attribution import OTHER, QUERY, influence, run
from tests.support.tiny import tiny_encoder, tiny_model
from wherefrom.attributors import InfluenceFunction, Magnitude
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.gradients.score_reduction import Breakdown
from wherefrom.models.diffusion import DiffusionModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_model(encoder=tiny_encoder(tmp_path_factory.mktemp("text") / "encoder"))


def test_the_sizes_are_those_of_the_methods_scores(model: DiffusionModel, tmp_path: Path) -> None:
    def method() -> InfluenceFunction:
        return influence(grid=LossGrid(timesteps=4), breakdown=Breakdown(timestep_bands=2), flip="mean")

    sized = run(Magnitude(method()), model, tmp_path, QUERY, OTHER)
    signed = run(method(), model, tmp_path, QUERY, OTHER)
    for result, expected in zip(sized, signed, strict=True):
        assert len(expected.null)
        signs = [expected.scores, *expected.parts.values()]
        assert min(each.min() for each in signs) < 0 < max(each.max() for each in signs)
        np.testing.assert_allclose(result.scores, np.abs(expected.scores), rtol=1e-9)
        np.testing.assert_allclose(result.null, np.abs(expected.null), rtol=1e-9)
        assert result.parts.keys() == expected.parts.keys()
        for name, part in expected.parts.items():
            np.testing.assert_allclose(result.parts[name], np.abs(part), rtol=1e-9)


def test_it_is_another_method_and_needs_what_the_method_needs() -> None:
    sized, signed = Magnitude(influence()), influence()
    assert sized.identity() == {"method": f"{signed.identity()['method']}, by size", "of": signed.identity()}
    assert sized.requires == signed.requires
    assert sized.takes_regions == signed.takes_regions
