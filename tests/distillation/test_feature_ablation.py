"""Feature ablation: planted rankers that use both encoders, one, or none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wherefrom.distillation.feature_ablation import ablate_features
from wherefrom.distillation.ranker import Ranker
from wherefrom.distillation.teacher_set import Features, TeacherSet
from wherefrom.metrics.retrieval import MeanAveragePrecision, top_of

N, QUERIES, WIDTH = 200, 30, 4
WIDTHS = {"picture": WIDTH, "caption": WIDTH}


def teacher_set(seed: int = 0, width: int = N) -> TeacherSet:
    """The teacher's scores are cosines of all features."""
    random = np.random.default_rng(seed)
    training, queries = random.normal(size=(N, 2 * WIDTH)), random.normal(size=(QUERIES, 2 * WIDTH))
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (training, queries)]
    scores = unit[1] @ unit[0].T
    rows = np.argsort(-scores, axis=1)[:, :width].astype(np.int32)
    names = [tuple(f"{what}{index}" for index in range(count)) for what, count in (("i", N), ("q", QUERIES))]
    features = {
        name: Features(training[:, part].astype(np.float32), queries[:, part].astype(np.float32))
        for name, part in (("a", slice(WIDTH)), ("b", slice(WIDTH, None)))
    }
    ordered = np.take_along_axis(scores, rows, axis=1).astype(np.float32)
    return TeacherSet(names[0], names[0], names[1], names[1], rows, ordered, features, {})


def linear(*used: float) -> Ranker:
    """A ranker whose embedding is its features, each encoder's times a number."""
    ranker = Ranker(2 * WIDTH, hidden=0, outputs=2 * WIDTH)
    with torch.no_grad():
        ranker.mlp.output_layer.weight.copy_(torch.diag(torch.tensor(used).repeat_interleave(WIDTH)))
        ranker.mlp.output_layer.bias.zero_()
    return ranker


def test_what_is_used_is_missed() -> None:
    teacher = teacher_set()
    result = ablate_features(teacher, ranker=linear(1.0, 1.0), features=["a", "b"], widths=WIDTHS, k=10)
    assert list(result) == ["nothing", "picture", "caption"]
    assert (result["nothing"].mean, result["nothing"].drop, result["nothing"].count) == (1.0, 0.0, QUERIES)
    for name in WIDTHS:
        assert result[name].drop == pytest.approx(1.0 - result[name].mean)
        assert result[name].drop > 10 * result[name].drop_error > 0


def test_what_is_ignored_is_not() -> None:
    result = ablate_features(teacher_set(), ranker=linear(1.0, 0.0), features=["a", "b"], widths=WIDTHS, k=10)
    assert result["caption"].drop == result["caption"].drop_error == 0.0
    assert result["caption"].mean == result["nothing"].mean
    assert result["picture"].drop > 5 * result["picture"].drop_error > 0


def test_without_the_only_half_it_is_chance() -> None:
    result = ablate_features(teacher_set(1), ranker=linear(0.0, 1.0), features=["a", "b"], widths=WIDTHS, k=10)
    random = np.random.default_rng(0)
    relevant = torch.zeros(QUERIES, N, dtype=torch.bool)
    relevant[:, :10] = True
    chance = MeanAveragePrecision()
    for _ in range(20):
        chance.update(torch.from_numpy(random.normal(size=(QUERIES, N))), relevant)
    assert abs(result["caption"].mean - float(chance.compute()["mean"])) < 4 * result["caption"].error


def test_a_ranker_that_knows_nothing_is_not_handed_the_teachers_order() -> None:
    ranker = linear(0.0, 0.0)
    with torch.no_grad():
        ranker.mlp.output_layer.bias.fill_(1.0)
    assert ablate_features(teacher_set(), ranker=ranker, features=["a", "b"], widths=WIDTHS, k=10)["nothing"].mean < 0.2


def test_as_they_are_it_is_map_of_the_scored_images() -> None:
    torch.manual_seed(0)
    teacher, ranker = teacher_set(2, width=50), Ranker(2 * WIDTH, width=8, hidden=1, outputs=8)
    result = ablate_features(teacher, ranker=ranker, features=["a", "b"], widths=WIDTHS, k=0.1)["nothing"]
    metric = MeanAveragePrecision()
    both = teacher.concatenated(["a", "b"])
    with torch.no_grad():
        ranker.eval()
        queries, images = (ranker.embed(torch.from_numpy(side)) for side in (both.queries, both.training))
        for row, (chosen, scores) in enumerate(zip(teacher.rows, teacher.scores, strict=True)):
            cosines = images[torch.from_numpy(chosen).long()] @ queries[row]
            metric.update(cosines[None], top_of(torch.from_numpy(scores)[None], 5))
    expected = metric.compute()
    assert result.mean == pytest.approx(float(expected["mean"]), rel=1e-5)
    assert result.error == pytest.approx(float(expected["error"]), rel=1e-4)


def test_the_seed_decides_and_the_set_is_left_as_it_was() -> None:
    teacher, ranker = teacher_set(), linear(1.0, 1.0)
    before = teacher.features["a"].training.copy()
    first = ablate_features(teacher, ranker=ranker, features=["a", "b"], widths=WIDTHS, k=10, seed=1)
    assert first == ablate_features(teacher, ranker=ranker, features=["a", "b"], widths=WIDTHS, k=10, seed=1)
    assert first != ablate_features(teacher, ranker=ranker, features=["a", "b"], widths=WIDTHS, k=10, seed=2)
    np.testing.assert_array_equal(teacher.features["a"].training, before)


def test_what_cannot_be_permuted_is_refused() -> None:
    teacher, ranker = teacher_set(), linear(1.0, 1.0)
    for wrong in ({}, {"picture": 3, "caption": 4}, {"picture": 0, "caption": 8}):
        with pytest.raises(ValueError, match="must be positive and sum to the 8 features"):
            ablate_features(teacher, ranker=ranker, features=["a", "b"], widths=wrong)
    with pytest.raises(ValueError, match="at least two queries"):
        ablate_features(teacher.of_queries([0]), ranker=ranker, features=["a", "b"], widths=WIDTHS)
    with pytest.raises(ValueError, match="has no features 'c'"):
        ablate_features(teacher, ranker=ranker, features=["a", "c"], widths=WIDTHS)
