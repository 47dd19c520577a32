"""Every method on a training set with repeats, against the set in which each image physically occurs so often.

The copies draw the noise of their originals (`tests.support.repeats`), so that both sides are equal to rounding: a loss
increase is that of each copy, and what removal takes away is the sum over an image's copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.attribution import FISHER, GRID, HELD_OUT, OTHER, QUERY
from tests.support.repeats import by_image, with_repeats, written_out
from tests.support.tiny import one_process, tiny_encoder, tiny_latents, tiny_model
from wherefrom.attributors import (
    TRAK,
    AttributionByUnlearning,
    Attributor,
    InfluenceBank,
    InfluenceFunction,
    JourneyTRAK,
    Magnitude,
    PixelSimilarity,
    Query,
    RankEnsemble,
    Rerank,
    Scores,
    TrainingData,
)
from wherefrom.attributors.influence.gradient_bank import Compression
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings
from wherefrom.curvature import EKFAC, DiagonalFisher
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossSamples
from wherefrom.gradients.projection import Projection
from wherefrom.gradients.score_reduction import Breakdown, spread_weights
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.sampling import Trajectory
from wherefrom.rankings.ranking_file import normalised_ranks
from wherefrom.runtime.artifacts import Store

REPEATS = (3, 1, 2, 1, 5, 1, 1)
WEIGHTS = np.array(REPEATS, dtype=np.float64)
DATA = tiny_latents(len(REPEATS))
WEIGHTED, COPIES = with_repeats(DATA, REPEATS), written_out(DATA, REPEATS)
STEPS = (999, 749, 499, 249)
PREDICTED = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
JOURNEY = replace(QUERY, trajectory=Trajectory(STEPS, PREDICTED))
P = Projection(128)
QUICK: dict[str, Any] = {"noise_samples": 12, "grid": GRID}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_model(encoder=tiny_encoder(tmp_path_factory.mktemp("text") / "encoder"))


def scored(attributor: Attributor, model: DiffusionModel, data: EncodedImages, root: Path, query: Query) -> Scores:
    attributor.fit(TrainingData(data.images, data, HELD_OUT.images, HELD_OUT), model, Store(root), one_process())
    (scores,) = attributor.score([query])
    return scores


def close(result: np.ndarray, expected: np.ndarray, rtol: float = 1e-6) -> None:
    np.testing.assert_allclose(result, expected, rtol=rtol, atol=1e-8 * np.abs(expected).max())


ADDED_UP: dict[str, Callable[[], Attributor]] = {
    "influence function": lambda: InfluenceFunction(
        "all", **QUICK, curvature=EKFAC(FISHER), breakdown=Breakdown(3, captions=True)
    ),
    "influence function, diagonal": lambda: InfluenceFunction(
        "all", **QUICK, curvature=DiagonalFisher(FISHER), timestep_weights="equal", flip="mean"
    ),
    "bank of factors": lambda: InfluenceBank(**QUICK, half=False, curvature=EKFAC(FISHER)),
    "bank of coordinates": lambda: InfluenceBank(
        **QUICK, half=False, curvature=DiagonalFisher(FISHER), compression=Compression("eigenbasis", 90)
    ),
    "bank, second order": lambda: InfluenceBank(
        **QUICK, half=False, second_order=0.3, curvature=DiagonalFisher(FISHER)
    ),
    "TRAK": lambda: TRAK(projection=P, grid=GRID, noise_samples=12),
    "TRAK, absolute": lambda: TRAK(
        projection=P, grid=GRID, noise_samples=12, relative_lambda=None, absolute_lambda=0.1, flip="mean"
    ),
    "D-TRAK": lambda: TRAK(projection=P, grid=GRID, noise_samples=12, output="square_output"),
    "JourneyTRAK": lambda: JourneyTRAK(projection=P, grid=LossSamples(3), timesteps=[749, 249], resamplings=4),
}


@pytest.mark.parametrize("name", list(ADDED_UP))
def test_what_removal_takes_away_is_the_sum_over_the_copies(model: DiffusionModel, tmp_path: Path, name: str) -> None:
    weighted = scored(ADDED_UP[name](), model, WEIGHTED, tmp_path, JOURNEY)
    copies = scored(ADDED_UP[name](), model, COPIES, tmp_path, JOURNEY)
    assert copies.per_copy is None
    assert weighted.per_copy is not None
    close(weighted.scores, np.array([values.sum() for values in by_image(copies.scores, REPEATS)]))
    close(weighted.per_copy, np.array([values.mean() for values in by_image(copies.scores, REPEATS)]))
    close(weighted.null, copies.null)
    for part, values in weighted.parts.items():
        close(values, np.array([each.sum() for each in by_image(copies.parts[part], REPEATS)]))
    assert bool(weighted.parts) == (name == "influence function")
    plain = scored(ADDED_UP[name](), model, DATA, tmp_path, JOURNEY)
    assert not np.allclose(plain.scores, weighted.per_copy, rtol=1e-2)


def test_a_single_step_of_a_journey_adds_up_too(model: DiffusionModel, tmp_path: Path) -> None:
    rows = []
    for data in (WEIGHTED, COPIES):
        attributor = ADDED_UP["JourneyTRAK"]()
        scored(attributor, model, data, tmp_path, JOURNEY)
        assert isinstance(attributor, JourneyTRAK)
        rows.append(attributor.step_scores(JOURNEY)[1])
    close(rows[0], np.stack([[each.sum() for each in by_image(row, REPEATS)] for row in rows[1]]))


@pytest.mark.parametrize("curvature", [DiagonalFisher(FISHER), EKFAC(FISHER)])
@pytest.mark.parametrize(
    "step", [{"relative_loss_increase": None, "alpha": 0.05}, {"relative_loss_increase": 0.01, "steps": 2}]
)
def test_a_loss_increase_is_that_of_each_copy(
    model: DiffusionModel, tmp_path: Path, curvature: Any, step: dict[str, Any]
) -> None:
    settings = UnlearningSettings(noise_samples=12, measurement_samples=12, **step)

    def method() -> AttributionByUnlearning:
        return AttributionByUnlearning("all", unlearning=settings, grid=GRID, curvature=curvature)

    weighted, copies, plain = (scored(method(), model, data, tmp_path, QUERY) for data in (WEIGHTED, COPIES, DATA))
    assert weighted.per_copy is None
    for score, values in zip(weighted.scores, by_image(copies.scores, REPEATS), strict=True):
        close(values, np.full(len(values), score))
    close(weighted.null, copies.null)
    assert weighted.facts["alpha"] == pytest.approx(copies.facts["alpha"], rel=1e-6)
    assert not np.allclose(plain.scores, weighted.scores, rtol=1e-2)


def test_candidates_keep_their_own_repeats(model: DiffusionModel, tmp_path: Path) -> None:
    attributor = InfluenceFunction("all", **QUICK, curvature=DiagonalFisher(FISHER))
    whole = scored(attributor, model, WEIGHTED, tmp_path, QUERY)
    chosen = [DATA.ids[4], DATA.ids[0]]
    for method in (
        attributor,
        InfluenceBank(**QUICK, half=False, curvature=DiagonalFisher(FISHER)),
        ADDED_UP["TRAK"](),
    ):
        whole = scored(method, model, WEIGHTED, tmp_path, QUERY)
        (some,) = method.score([QUERY], chosen)
        assert some.ids == tuple(chosen)
        close(some.scores, whole.scores[[4, 0]])
        assert some.per_copy is not None
        close(some.scores / some.per_copy, WEIGHTS[[4, 0]])


def test_methods_that_wrap_others_keep_the_scores_of_one_copy(model: DiffusionModel, tmp_path: Path) -> None:
    def inner() -> InfluenceFunction:
        return InfluenceFunction("all", **QUICK, curvature=DiagonalFisher(FISHER))

    plain, near = (scored(method, model, WEIGHTED, tmp_path, QUERY) for method in (inner(), PixelSimilarity()))
    assert plain.per_copy is not None
    size = scored(Magnitude(inner()), model, WEIGHTED, tmp_path, QUERY)
    assert size.per_copy is not None
    np.testing.assert_array_equal(size.scores, np.abs(plain.scores))
    np.testing.assert_array_equal(size.per_copy, np.abs(plain.per_copy))

    both = scored(RankEnsemble([inner(), PixelSimilarity()]), model, WEIGHTED, tmp_path, QUERY)
    similar = normalised_ranks(near.ids, near.scores)
    assert both.per_copy is not None
    close(both.scores, -(normalised_ranks(plain.ids, plain.scores) + similar) / 2)
    close(both.per_copy, -(normalised_ranks(plain.ids, plain.per_copy) + similar) / 2)

    few = scored(Rerank(inner(), PixelSimilarity(), 3), model, WEIGHTED, tmp_path, QUERY)
    assert few.per_copy is not None
    first = {name for name, _ in few.top(3)}
    kept = np.array([name in first for name in few.ids])
    close(few.scores[kept], plain.scores[kept])
    close(few.per_copy[kept], plain.per_copy[kept])
    assert few.per_copy[~kept].max() < few.per_copy[kept].min()


def test_similarities_have_no_use_for_repeats(model: DiffusionModel, tmp_path: Path) -> None:
    weighted, plain = (scored(PixelSimilarity(), model, data, tmp_path, OTHER) for data in (WEIGHTED, DATA))
    np.testing.assert_array_equal(weighted.scores, plain.scores)
    assert weighted.per_copy is None


def test_timesteps_are_weighed_by_the_spread_over_all_copies() -> None:
    change = torch.randn(len(REPEATS), 2, 1, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = torch.from_numpy(WEIGHTS)
    expected = spread_weights(change.repeat_interleave(counts.long(), dim=0))
    torch.testing.assert_close(spread_weights(change, counts), expected, rtol=0, atol=0)
    assert not torch.allclose(spread_weights(change), expected)
    torch.testing.assert_close(spread_weights(change, torch.ones(len(REPEATS))), spread_weights(change), rtol=0, atol=0)
