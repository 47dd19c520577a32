"""What a ranking with ties is worth: the mean over every order of every tie, by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from wherefrom.metrics.linear_datamodeling import LinearDatamodelingScore
from wherefrom.metrics.null_distribution import family_wise_p_value, p_values
from wherefrom.metrics.rank_correlation import correlations, spearman
from wherefrom.metrics.reliability import split_half
from wherefrom.metrics.retrieval import MeanAveragePrecision, RecallAtK, ranked, top_of
from wherefrom.metrics.ties import average_precision, first_hit, is_constant, recall

CASES = {
    "all equal": ([0.0] * 5, [1, 0, 0, 1, 0]),
    "all equal and relevant": ([0.0] * 4, [1] * 4),
    "no ties": ([5.0, 1.0, 3.0, 2.0], [0, 1, 1, 0]),
    "a tie in the middle": ([9.0, 5.0, 5.0, 5.0, 1.0], [1, 0, 1, 0, 1]),
    "two ties": ([2.0, 1.0, 2.0, 1.0, 2.0, 1.0], [0, 1, 1, 1, 0, 0]),
    "a tie without a relevant image": ([3.0, 3.0, 2.0, 1.0, 1.0], [0, 0, 1, 1, 0]),
    "a tie at the end": ([3.0, 2.0, 2.0, 2.0], [0, 1, 0, 0]),
}


def orders(scores: list[float], relevant: list[int]) -> list[list[int]]:
    """Relevance by place in every order that the scores allow."""
    return [
        [relevant[index] for index in order]
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]


def precision_of(hits: list[int]) -> float:
    return sum(sum(hits[: place + 1]) / (place + 1) for place in range(len(hits)) if hits[place]) / sum(hits)


def both(scores: list[float], relevant: list[int]) -> tuple[Tensor, Tensor]:
    return ranked(torch.tensor([scores], dtype=torch.float64), torch.tensor([relevant], dtype=torch.bool))


@pytest.mark.parametrize("case", CASES)
def test_values_are_means_over_all_orders_of_the_ties(case: str) -> None:
    scores, relevant = CASES[case]
    every = orders(scores, relevant)
    assert average_precision(*both(scores, relevant)).item() == pytest.approx(np.mean([precision_of(h) for h in every]))
    for k in range(1, len(scores) + 1):
        expected = np.mean([sum(hits[:k]) / sum(hits) for hits in every])
        assert recall(*both(scores, relevant), k).item() == pytest.approx(expected)
    assert first_hit(*both(scores, relevant)).item() == pytest.approx(np.mean([hits.index(1) + 1 for hits in every]))


def test_values_do_not_depend_on_the_order_in_which_images_are_given() -> None:
    random = np.random.default_rng(0)
    scores, relevant = random.integers(0, 4, 30).astype(float), random.random(30) < 0.3
    order = random.permutation(30)
    for first, second in ((scores, relevant), (scores[order], relevant[order])):
        pair = ranked(torch.from_numpy(first)[None], torch.from_numpy(second)[None])
        values = [average_precision(*pair).item(), recall(*pair, 7).item(), first_hit(*pair).item()]
        assert values == pytest.approx(
            [
                each(*ranked(torch.from_numpy(scores)[None], torch.from_numpy(relevant)[None])).item()
                for each in (average_precision, lambda *both: recall(*both, 7), first_hit)
            ]
        )


def test_scores_that_are_all_equal_have_the_precision_of_a_random_order_and_not_one() -> None:
    relevant = torch.zeros(1, 100, dtype=torch.bool)
    relevant[0, :10] = True  # the teacher's order, in which a stable sort would find all of them
    metric, found = MeanAveragePrecision(), RecallAtK(10)
    metric.update(torch.zeros(1, 100), relevant)
    found.update(torch.zeros(1, 100), relevant)
    random = np.random.default_rng(0)
    drawn = [precision_of(random.permutation(relevant[0].int().numpy()).tolist()) for _ in range(4000)]
    assert metric.compute()["mean"].item() == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 4000**0.5)
    assert found.compute()["mean"].item() == pytest.approx(0.1)


def test_values_without_ties_have_the_bits_that_they_had() -> None:
    scores = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    relevant = torch.rand(20, 300, generator=torch.Generator().manual_seed(1)) < 0.1
    hits = relevant.gather(1, torch.argsort(scores, dim=1, descending=True, stable=True)).double()
    precision = hits.cumsum(dim=1) / torch.arange(1, 301)
    pair = ranked(scores, relevant)
    assert torch.equal(average_precision(*pair), (precision * hits).sum(dim=1) / hits.sum(dim=1))
    assert torch.equal(recall(*pair, 30), hits[:, :30].sum(dim=1) / hits.sum(dim=1))


def test_a_teacher_that_tells_no_images_apart_does_not_prefer_the_first_positions() -> None:
    first = top_of(torch.zeros(1, 1000), 100)[0]
    assert int(first.sum()) == 100
    assert 2 < int(first[:100].sum()) < 25  # about 10
    assert torch.equal(top_of(torch.zeros(2, 1000), 100)[1], first)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_is_equal_as_far_as_the_precision_can_tell(scale: float, dtype: type[np.floating]) -> None:
    values = np.full(50, 0.1 * scale, dtype=dtype)
    assert is_constant(values)
    rounded = values.copy()
    rounded[::2] = np.nextafter(values[::2], np.array(1e38, dtype))
    assert is_constant(rounded)
    assert is_constant(torch.from_numpy(rounded))
    real = values * (1 + np.arange(50, dtype=dtype) * 20 * np.finfo(dtype).eps)
    assert not is_constant(real)
    assert is_constant(np.zeros(3))
    assert not is_constant(np.array([0.0, 5e-324]))


@pytest.mark.parametrize("constant", [0.1, 1 / 3, -7.7, 1e-12, 123456.789, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_linear_datamodeling_score_of_constant_scores_is_undefined(constant: float, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    subsets = torch.stack([torch.randperm(1001, generator=random) < 500 for _ in range(32)])
    losses = torch.randn(3, 32, generator=random, dtype=torch.float64)
    scores = torch.full((3, 1001), constant, dtype=dtype)
    scores[2] = torch.randn(1001, generator=random)
    metric = LinearDatamodelingScore()
    metric.update(scores[:1], subsets, losses[:1])
    metric.update(scores[1:], subsets, losses[1:])
    values = torch.cat(metric.values)
    assert values[:2].isnan().all()
    result = metric.compute()
    assert (int(result["count"]), int(result["undefined"])) == (1, 2)
    sums = scores[2].double() @ subsets.double().T
    assert result["mean"].item() == pytest.approx(float(spearmanr(sums, -losses[2]).statistic), rel=1e-6)
    assert result["error"].isnan()


def test_a_linear_datamodeling_score_is_defined_where_sums_differ_or_losses_do_not() -> None:
    subsets = torch.arange(10)[None] < torch.tensor([2, 4, 6, 8])[:, None]  # constant scores predict by size
    losses = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    metric = LinearDatamodelingScore()
    metric.update(torch.full((1, 10), 0.1, dtype=torch.float64), subsets, losses)
    assert metric.compute()["mean"].item() == pytest.approx(1.0)
    metric.update(torch.arange(10.0)[None], subsets, torch.full((1, 4), 0.1))
    result = metric.compute()
    assert (int(result["count"]), int(result["undefined"])) == (1, 1)
    nothing = LinearDatamodelingScore()
    nothing.update(torch.zeros(1, 10), subsets, losses)
    assert nothing.compute()["mean"].isnan()
    with pytest.raises(ValueError, match="needs finite scores and losses"):
        nothing.update(torch.full((1, 10), math.nan), subsets, losses)


def test_a_correlation_with_a_constant_is_left_out_of_the_mean_and_counted() -> None:
    a, b, flat = np.arange(6.0), np.array([2.0, 1, 4, 3, 6, 5]), np.full(6, 1 / 3)
    flat[::2] = np.nextafter(flat[::2], 1)
    assert math.isnan(spearman(a, flat))
    mean, error, count = correlations({"x": [a, a, a], "y": [b, flat, b[::-1]], "z": [flat, flat, flat]})
    expected = [spearmanr(a, b).statistic, spearmanr(a, b[::-1]).statistic]
    assert mean[0, 1] == pytest.approx(np.mean(expected))
    assert error[0, 1] == pytest.approx(np.std(expected, ddof=1) / 2**0.5)
    assert count.tolist() == [[3, 2, 0], [2, 3, 0], [0, 0, 3]]
    assert math.isnan(mean[0, 2])
    assert math.isnan(error[0, 2])


def test_halves_that_are_equal_up_to_rounding_have_no_reliability() -> None:
    noise = np.nextafter(np.full((40, 6), 0.1), np.random.default_rng(0).choice([0.0, 1.0], (40, 6)))

    def score(part: NDArray[np.int64]) -> NDArray[np.float64]:
        return noise[:, part].mean(axis=1)

    assert math.isnan(split_half(score, 6, seed=0))


def test_p_values_of_ties_with_the_null_count_them_all() -> None:
    assert p_values(np.array([0.0, 1.0]), np.zeros(9)).tolist() == [1.0, 0.1]
    # A null without a tail cannot make the first of 3 certain: each is above 19 of 19.
    assert family_wise_p_value(np.array([1.0, 0.0, 0.0]), np.zeros(19)) == pytest.approx(1 - 0.95**3)
    assert family_wise_p_value(np.zeros(3), np.zeros(19)) == 1.0
