"""Blocks of labelled pairs: right labels, unbiased weights, gradients of the loop over pairs, and no memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.planted import planted_teacher
from wherefrom.distillation.losses import BinaryCrossEntropy, Ordinal, RankingLoss, Regression, SquaredError
from wherefrom.distillation.pair_blocks import BlockSampler, PairBlock, TeacherPairs
from wherefrom.distillation.ranker import Ranker
from wherefrom.distillation.teacher_set import TeacherSet

WHOLE = planted_teacher()
NEAR = planted_teacher(queries=13, images=40, scored=9)


def pairs_of(teacher: TeacherSet, candidates: int | None = None, double: bool = False) -> TeacherPairs:
    pairs = TeacherPairs.of(teacher, teacher.concatenated(["first", "second"]), candidates)
    if double:
        pairs = replace(pairs, queries=pairs.queries.double(), images=pairs.images.double())
    return pairs


def dense(sampler: BlockSampler, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean weight of every (query, image) over many blocks, and its standard error."""
    shape = steps, len(sampler.pairs.queries), len(sampler.pairs.images)
    weights = torch.zeros(shape, dtype=torch.float64)
    for step in range(steps):
        block = sampler.block(step)
        weights[step][block.query_rows[:, None], block.image_rows[None]] = block.weights.double()
    return weights.mean(0), weights.std(0) / steps**0.5


def assert_same(result: PairBlock, expected: PairBlock) -> None:
    for name, value in expected._asdict().items():
        assert torch.equal(torch.as_tensor(getattr(result, name)), torch.as_tensor(value)), name


def test_labels_are_the_teachers() -> None:
    sampler = BlockSampler(pairs_of(NEAR), seed=1, queries=5, images=20)
    scores = NEAR.scores.astype(np.float64)
    standard = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
    features = NEAR.concatenated(["first", "second"])
    seen = 0
    for step in range(8):
        block = sampler.block(step)
        assert len(set(block.image_rows.tolist())) == 20
        assert np.array_equal(block.queries.numpy(), features.queries[block.query_rows])
        assert np.array_equal(block.images.numpy(), features.training[block.image_rows])
        for i, query in enumerate(block.query_rows.tolist()):
            for j, image in enumerate(block.image_rows.tolist()):
                ranked = NEAR.rows[query].tolist()
                assert bool(block.labelled[i, j]) == (image in ranked)
                position = ranked.index(image) if image in ranked else 8
                assert float(block.ranks[i, j]) == pytest.approx(position / 9, rel=1e-6)
                assert float(block.scores[i, j]) == pytest.approx(standard[query, position], rel=1e-5)
                assert block.weights[i, j] > 0
        seen += int(block.labelled.sum())
    assert seen > 100


def test_every_pair_weighs_on_average_what_the_recipe_gives_it() -> None:
    sampler = BlockSampler(pairs_of(NEAR), seed=2, queries=4, images=10, outside=0.2)
    mean, error = dense(sampler, 700)
    expected = torch.full((13, 40), 0.2 / (13 * 31), dtype=torch.float64)
    expected[torch.arange(13)[:, None], torch.tensor(NEAR.rows).long()] = 0.8 / (13 * 9)
    assert ((mean - expected).abs() <= 5 * error).all()
    assert (error < expected).all(), "too few draws to tell"
    labelled = torch.zeros(13, 40, dtype=torch.bool)
    labelled[torch.arange(13)[:, None], torch.tensor(NEAR.rows).long()] = True
    assert float(mean[~labelled].sum()) == pytest.approx(0.2, rel=0.03)
    assert float(mean[labelled].sum()) == pytest.approx(0.8, rel=0.03)


def test_whole_rankings_have_no_outside() -> None:
    sampler = BlockSampler(pairs_of(WHOLE), seed=0, queries=4, images=7, outside=0.3)
    for step in range(5):
        block = sampler.block(step)
        assert block.labelled.all()
        torch.testing.assert_close(block.weights, torch.full((4, 7), 1 / 28))
    assert sampler.steps() == round(12 * 30 / 28)


def test_without_outside_images_only_labelled_pairs_weigh() -> None:
    block = BlockSampler(pairs_of(NEAR), seed=0, queries=4, images=20, outside=0.0).block(0)
    assert torch.equal(block.weights > 0, block.labelled)
    assert not block.labelled.all()


def test_an_epoch_has_as_many_labelled_pairs_as_there_are() -> None:
    teacher = planted_teacher(queries=64, images=300, scored=30)
    sampler = BlockSampler(pairs_of(teacher), seed=0, queries=8, images=50)
    result = sum(int(sampler.block(step).labelled.sum()) for step in range(sampler.steps()))
    assert result == pytest.approx(64 * 30, rel=0.05)


def test_no_query_comes_twice_in_a_pass() -> None:
    sampler = BlockSampler(pairs_of(NEAR), seed=0, queries=4, images=8)
    passes = [torch.cat([sampler.block_queries(3 * turn + step) for step in range(3)]).tolist() for turn in range(9)]
    assert all(len(set(each)) == 12 for each in passes)
    assert len({tuple(each) for each in passes}) == 9
    assert len({next(iter(set(range(13)) - set(each))) for each in passes}) > 3, "always the same one sits out"


@pytest.mark.parametrize("loss", [BinaryCrossEntropy(), SquaredError(), Ordinal(5).double(), Regression()])
def test_gradients_are_those_of_the_loop_over_pairs(loss: RankingLoss) -> None:
    torch.manual_seed(0)
    ranker = Ranker(6, width=5, hidden=2, outputs=4).double().eval()
    block = BlockSampler(pairs_of(NEAR, double=True), seed=3, queries=4, images=10).block(5)
    parameters = [*ranker.parameters(), *loss.parameters()]
    (loss(ranker(block.queries, block.images), block.ranks, block.scores) * block.weights).sum().backward()
    result = [parameter.grad for parameter in parameters]
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    features = NEAR.concatenated(["first", "second"])
    for i, query in enumerate(block.query_rows.tolist()):
        for j, image in enumerate(block.image_rows.tolist()):
            sides = [
                torch.tensor(side[row])[None].double()
                for side, row in ((features.queries, query), (features.training, image))
            ]
            cosine = torch.cosine_similarity(ranker.mlp(sides[0]), ranker.mlp(sides[1]))
            one = loss(cosine * ranker.scale + ranker.bias, block.ranks[i, j, None], block.scores[i, j, None])
            gradients = torch.autograd.grad(one.sum(), parameters)
            for total, gradient in zip(expected, gradients, strict=True):
                total += block.weights[i, j] * gradient
    for gradient, total in zip(result, expected, strict=True):
        torch.testing.assert_close(gradient, total, rtol=1e-9, atol=1e-12)


def test_a_subsample_of_candidates_keeps_the_order_and_the_others_are_not_outside() -> None:
    pairs = pairs_of(NEAR, candidates=4)
    assert pairs.used == 4
    assert pairs.outside == 31
    for query, rows in enumerate(pairs.rows.tolist()):
        places = [NEAR.rows[query].tolist().index(row) for row in rows]
        assert places[:4] == sorted(places[:4])
        assert sorted(places) == list(range(9))
    assert len({tuple(sorted(rows[:4])) for rows in pairs.rows.tolist()}) > 6
    sampler = BlockSampler(pairs, seed=0, queries=13, images=40, outside=0.25)
    block = sampler.block(0)
    for i, query in enumerate(block.query_rows.tolist()):
        for j, image in enumerate(block.image_rows.tolist()):
            place = pairs.rows[query].tolist().index(image) if image in pairs.rows[query] else -1
            assert bool(block.labelled[i, j]) == (0 <= place < 4)
            assert (block.weights[i, j] == 0) == (place >= 4)
            assert float(block.ranks[i, j]) == pytest.approx((place if 0 <= place < 4 else 3) / 4)
    assert float(block.weights[block.labelled].sum()) == pytest.approx(0.75, rel=1e-5)
    assert float(block.weights[~block.labelled].sum()) == pytest.approx(0.25, rel=1e-5)
    other = TeacherPairs.of(NEAR, NEAR.concatenated(["first"]), 4, seed=1)
    assert not torch.equal(other.rows, pairs.rows)


def test_a_block_is_a_function_of_seed_and_step() -> None:
    forward = BlockSampler(pairs_of(NEAR), 5, queries=4, images=10)
    blocks = [forward.block(step) for step in range(9)]
    for step in reversed(range(9)):
        assert_same(BlockSampler(pairs_of(NEAR), 5, queries=4, images=10).block(step), blocks[step])
    other = BlockSampler(pairs_of(NEAR), 6, queries=4, images=10).block(0)
    assert not torch.equal(other.image_rows, blocks[0].image_rows)
    assert other.key != blocks[0].key


def test_processes_share_a_block() -> None:
    block = BlockSampler(pairs_of(NEAR), seed=0, queries=5, images=11).block(2)
    parts = [block.share(rank, 3) for rank in range(3)]
    assert sorted(torch.cat([part.image_rows for part in parts]).tolist()) == sorted(block.image_rows.tolist())
    assert sum(float(part.weights.sum()) for part in parts) / 3 == pytest.approx(float(block.weights.sum()), rel=1e-5)
    assert len({part.key for part in parts}) == 3
    for rank, part in enumerate(parts):
        for name in ("ranks", "scores", "labelled"):
            assert torch.equal(getattr(part, name), getattr(block, name)[:, rank::3])
    assert block.share(0, 1) is block


def test_scores_that_are_all_alike_are_the_mean() -> None:
    flat = replace(NEAR, scores=np.full_like(NEAR.scores, 0.5))
    assert (pairs_of(flat).scores == 0).all()


def test_sizes_are_refused() -> None:
    for settings in ({"queries": 0}, {"images": 1}, {"outside": 1.0}, {"outside": -0.1}):
        with pytest.raises(ValueError, match="A block needs at least one query and two images"):
            BlockSampler(pairs_of(NEAR), 0, **settings)
    for candidates in (0, 10):
        with pytest.raises(ValueError, match=f"candidates is {candidates}, but the teacher scored 9 images"):
            pairs_of(NEAR, candidates)


def test_blocks_are_no_larger_than_what_there_is() -> None:
    sampler = BlockSampler(pairs_of(NEAR), 0, queries=1000, images=1000)
    block = sampler.block(0)
    assert block.ranks.shape == (13, 40)
    assert float(block.weights.sum()) == pytest.approx(1.0, rel=1e-5)
