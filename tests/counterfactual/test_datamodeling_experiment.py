"""Linear datamodeling score of tiny random models, against sums and correlations by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from tests.support.counterfactual import TinyEvaluation
from wherefrom.attributors import PixelSimilarity
from wherefrom.counterfactual.datamodeling_experiment import RandomSubsets, as_table, linear_datamodeling_score
from wherefrom.counterfactual.retraining import RetrainingJob


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEvaluation:
    return TinyEvaluation(tmp_path_factory.mktemp("datamodeling"), {"pixel": PixelSimilarity()})


def test_scores_are_correlations_of_losses_with_sums_by_hand(tiny: TinyEvaluation, tmp_path: Path) -> None:
    scores, ids = tiny.first(), tiny.models.ids
    subsets = RandomSubsets(count=5, repeated=3, further_seeds=(1, 2))
    pixel, ceiling = linear_datamodeling_score(tmp_path, scores, tiny.sweep, subsets)
    masks = subsets.masks(ids)
    seen = [[name for name, kept in zip(ids, mask, strict=True) if kept] for mask in masks]

    def losses(count: int, seed: int, query: str) -> list[float]:
        jobs = [RetrainingJob(tuple(name for name in ids if name not in kept), seed) for kept in seen[:count]]
        measured = tiny.sweep.measure(jobs)
        return [measured[job][query].loss for job in jobs]

    for value, top, each in zip(pixel.values, ceiling.values, scores["pixel"], strict=True):
        by_name = dict(zip(each.ids, np.asarray(each.scores, dtype=np.float64), strict=True))
        sums, query = [sum(by_name[name] for name in kept) for kept in seen], each.query.id
        # The more the images that a model saw say for a query, the lower its loss should be.
        assert value == pytest.approx(-spearmanr(sums, losses(5, 0, query)).statistic)
        others = np.mean([losses(3, seed, query) for seed in (1, 2)], axis=0)
        assert top == pytest.approx(spearmanr(losses(3, 0, query), others).statistic)
    known = [value for value in pixel.values if value is not None]
    assert (pixel.mean, pixel.count) == (pytest.approx(np.mean(known)), 3)
    assert pixel.low <= pixel.mean <= pixel.high
    assert (pixel.method, ceiling.method) == ("pixel", "another seed")
    stored = json.loads((tmp_path / "lds.json").read_text())
    assert stored["random_subsets"]["further_seeds"] == [1, 2]
    assert [row["method"] for row in stored["rows"]] == ["pixel", "another seed"]
    assert as_table([pixel, ceiling]).splitlines()[2].startswith(f"| pixel | {pixel.mean:.3f} ± ")


def test_constant_scores_have_no_score_and_the_table_says_so(tiny: TinyEvaluation, tmp_path: Path) -> None:
    scores = tiny.first()["pixel"]
    flat = [replace(each, scores=np.full(len(each.ids), 0.1)) for each in scores]
    subsets = RandomSubsets(count=5, repeated=0)
    rankings = {"pixel": scores, "some": [flat[0], *scores[1:]], "flat": flat}
    pixel, some, nothing = linear_datamodeling_score(tmp_path, rankings, tiny.sweep, subsets)
    assert (some.values[0], some.values[1:], some.count, some.undefined) == (None, pixel.values[1:], 2, 1)
    assert some.mean == pytest.approx(np.mean(pixel.values[1:]))
    assert (nothing.mean, nothing.error, nothing.low, nothing.count, nothing.undefined) == (None, None, None, 0, 3)
    lines = as_table([pixel, some, nothing]).splitlines()[2:]
    assert lines[0].endswith("| 3 |")
    assert lines[1].endswith("| 2 (1 undefined: constant scores) |")
    assert lines[2] == "| flat | undefined: constant scores | – | 0 (3 undefined: constant scores) |"
    assert json.loads((tmp_path / "lds.json").read_text())["rows"][2]["mean"] is None


def test_scores_of_some_images_or_of_no_method_are_refused(tiny: TinyEvaluation, tmp_path: Path) -> None:
    (first, *_) = tiny.first()["pixel"]
    cut = replace(first, ids=first.ids[:5], scores=first.scores[:5])
    with pytest.raises(ValueError, match="pixel did not score all training images for query"):
        linear_datamodeling_score(tmp_path, {"pixel": [cut]}, tiny.sweep)
    with pytest.raises(ValueError, match="needs the scores of at least one method"):
        linear_datamodeling_score(tmp_path, {}, tiny.sweep)


def test_subsets_are_random_and_of_one_size() -> None:
    ids = [f"image {index}" for index in range(41)]
    masks = RandomSubsets(count=200).masks(ids)
    assert (masks.sum(axis=1) == 20).all()
    assert abs(masks.mean(axis=0) - 20 / 41).max() < 0.15
    assert np.array_equal(RandomSubsets(count=5, repeated=0).masks(ids[::-1])[:, ::-1], masks[:5]), (
        "the order of the ids is not used"
    )
    assert not np.array_equal(RandomSubsets(count=5, seed=1, repeated=0).masks(ids), masks[:5])
    for settings in ({"count": 2, "repeated": 0}, {"share": 1.0}, {"repeated": 33}):
        with pytest.raises(ValueError, match="needs at least 3 subsets"):
            RandomSubsets(**settings)
