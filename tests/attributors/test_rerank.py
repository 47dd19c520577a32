"""A method among the nearest images: its own scores there, and all others after them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.attribution import OTHER, QUERY, TRAIN, influence, run
from tests.support.tiny import tiny_encoder, tiny_model
from wherefrom.attributors import PixelSimilarity, Rerank
from wherefrom.models.diffusion import DiffusionModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_model(encoder=tiny_encoder(tmp_path_factory.mktemp("text") / "encoder"))


def test_the_nearest_keep_the_methods_scores_and_the_rest_follows(model: DiffusionModel, tmp_path: Path) -> None:
    pruned = run(Rerank(influence(), PixelSimilarity(), k=5), model, tmp_path, QUERY, OTHER)
    whole = run(influence(), model, tmp_path, QUERY, OTHER)
    near = run(PixelSimilarity(), model, tmp_path, QUERY, OTHER)
    for result, exact, similar in zip(pruned, whole, near, strict=True):
        assert result.ids == TRAIN.ids
        assert result.query.id == exact.query.id
        chosen = [name for name, _ in similar.top(5)]
        expected = dict(zip(exact.ids, exact.scores, strict=True))
        ranked = [name for name, _ in result.top(len(result.ids))]
        assert ranked[:5] == sorted(chosen, key=lambda name: -expected[name])
        assert ranked[5:] == [name for name, _ in similar.top(len(TRAIN.ids))[5:]]
        scores = dict(zip(result.ids, result.scores, strict=True))
        np.testing.assert_allclose([scores[name] for name in chosen], [expected[name] for name in chosen], rtol=1e-6)
        np.testing.assert_allclose(result.null, exact.null, rtol=1e-6)


def test_both_tails_are_chosen_half_and_half(model: DiffusionModel, tmp_path: Path) -> None:
    (result,) = run(Rerank(influence(), PixelSimilarity(), k=5, tails="both"), model, tmp_path)
    (similar,) = run(PixelSimilarity(), model, tmp_path)
    order = [name for name, _ in similar.top(len(TRAIN.ids))]
    ranked = [name for name, _ in result.top(len(TRAIN.ids))]
    assert set(ranked[:5]) == {*order[:3], *order[-2:]}
    assert ranked[5:] == order[3:-2]


def test_all_of_them_are_the_method_itself(model: DiffusionModel, tmp_path: Path) -> None:
    (result,) = run(Rerank(influence(), PixelSimilarity(), k=len(TRAIN.ids)), model, tmp_path)
    (exact,) = run(influence(), model, tmp_path)
    np.testing.assert_allclose(result.scores, exact.scores, rtol=1e-6)


def test_settings_that_make_no_sense_are_refused(model: DiffusionModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        Rerank(influence(), PixelSimilarity(), k=0)
    with pytest.raises(ValueError, match="Unknown tails 'last'"):
        Rerank(influence(), PixelSimilarity(), k=1, tails="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"k is 1000, but there are {len(TRAIN.ids)} training images"):
        run(Rerank(influence(), PixelSimilarity(), k=1000), model, tmp_path)
