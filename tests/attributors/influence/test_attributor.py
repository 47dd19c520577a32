"""Influence functions: the limit of attribution by unlearning, and independent of how the work is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from tests.support.attribution import FISHER, GRID, HELD_OUT, OTHER, QUERY, TRAIN, influence, run
from tests.support.tiny import one_process, tiny_encoder, tiny_model
from wherefrom.attributors import AttributionByUnlearning, TrainingData
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings
from wherefrom.curvature import EKFAC, DiagonalFisher, Identity
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime.artifacts import Store


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_model(encoder=tiny_encoder(tmp_path_factory.mktemp("text") / "encoder"))


@pytest.mark.parametrize("curvature", [EKFAC(FISHER), DiagonalFisher(FISHER), Identity()])
def test_it_is_the_limit_of_unlearning(model: DiffusionModel, tmp_path: Path, curvature: Any) -> None:
    plain = curvature.form == "identity"
    (limit,) = run(influence(curvature=curvature), model, tmp_path)
    agreement, correlation = [], []
    # Without curvature the step is α g instead of (α/N) g.
    scale = 1 / len(TRAIN) if plain else 1.0
    size = float(np.abs(limit.scores).max())
    for step in (1e-1, 1e-2, 1e-5):
        alpha = step / size
        settings = UnlearningSettings(
            noise_samples=12,
            relative_loss_increase=None,
            alpha=alpha * scale,
            measurement_samples=2,
            newton=not plain,
        )
        abu = AttributionByUnlearning("all", unlearning=settings, grid=GRID, curvature=curvature)
        (result,) = run(abu, model, tmp_path)
        agreement.append(float(np.abs(result.scores / alpha - limit.scores).max()) / size)
        correlation.append(spearmanr(result.scores, limit.scores).statistic)
    assert agreement[0] > agreement[1] > agreement[2]
    assert agreement[2] < 1e-3
    assert correlation[0] <= correlation[1] <= correlation[2] == pytest.approx(1.0)
    # With a curvature the largest step is far from the limit; the plain gradient's is close already.
    assert plain or correlation[0] < 0.5
    assert limit.null.shape == (len(HELD_OUT),)


def test_blocks_of_queries_batches_and_candidates_change_nothing(model: DiffusionModel, tmp_path: Path) -> None:
    together = run(influence(), model, tmp_path / "a", QUERY, OTHER)
    alone = run(influence(queries_per_pass=1, batch_size=5), model, tmp_path / "b", QUERY, OTHER)
    assert [scores.query.id for scores in together] == ["query", "other"]
    for left, right in zip(together, alone, strict=True):
        np.testing.assert_allclose(left.scores, right.scores, rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(left.null, right.null, rtol=1e-7, atol=1e-12)
    assert not np.allclose(together[0].scores, together[1].scores)
    attributor = influence()
    attributor.fit(TrainingData(TRAIN.images, TRAIN), model, Store(tmp_path / "a"), one_process())
    (few,) = attributor.score([QUERY], [TRAIN.ids[7], TRAIN.ids[2]])
    assert few.ids == (TRAIN.ids[7], TRAIN.ids[2])
    np.testing.assert_allclose(few.scores, together[0].scores[[7, 2]], rtol=1e-9)


def test_what_it_refuses(model: DiffusionModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fit must run before score"):
        next(iter(influence().score([QUERY])))
    with pytest.raises(ValueError, match="InfluenceFunction needs a model"):
        run(influence(), None, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise_samples must be at least 1; given 0"):
        influence(noise_samples=0)
    with pytest.raises(
        ValueError, match=r"curvature must be DiagonalFisher\(\), EKFAC\(\) or Identity\(\); given 'full'"
    ):
        influence(curvature="full")
