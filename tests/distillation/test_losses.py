"""Losses of learning to rank against numbers worked out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from wherefrom.distillation.losses import BinaryCrossEntropy, Ordinal, RankingLoss, Regression, SquaredError

LOGITS = torch.tensor([[-3.0, -0.25, 0.0], [0.7, 2.0, 5.0]], dtype=torch.float64)
RANKS = torch.tensor([[0.0, 0.25, 0.6], [0.99, 0.5, 0.05]], dtype=torch.float64)
SCORES = torch.tensor([[2.5, 0.3, -0.1], [-1.0, 0.0, 1.5]], dtype=torch.float64)
LOSSES = [BinaryCrossEntropy(), SquaredError(), Ordinal(4).double(), Regression()]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy(logit: float, target: float) -> float:
    return -target * math.log(sigmoid(logit)) - (1 - target) * math.log(1 - sigmoid(logit))


def by_hand(loss: RankingLoss, logit: float, rank: float, score: float) -> float:
    if isinstance(loss, BinaryCrossEntropy):
        return cross_entropy(logit, rank)
    if isinstance(loss, SquaredError):
        return (sigmoid(logit) - rank) ** 2
    if isinstance(loss, Regression):
        return (logit + score) ** 2
    # Four levels begin at ranks 0, 1/4, 1/2, 3/4; the thresholds are the logits of the last three.
    thresholds = [math.log(1 / 3), 0.0, math.log(3)]
    reached = [rank >= 0.25, rank >= 0.5, rank >= 0.75]
    return sum(cross_entropy(logit - at, float(y)) for at, y in zip(thresholds, reached, strict=True)) / 3


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_one_value_a_pair_as_by_hand(loss: RankingLoss) -> None:
    result = loss(LOGITS, RANKS, SCORES)
    expected = [
        [by_hand(loss, *(float(part[i, j]) for part in (LOGITS, RANKS, SCORES))) for j in range(3)] for i in range(2)
    ]
    torch.testing.assert_close(result.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_all_pull_the_logit_of_what_is_influential_down(loss: RankingLoss) -> None:
    """So that the scale becomes negative, whatever the loss."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    first_and_last = torch.tensor([0.0, 0.99], dtype=torch.float64)
    loss(logits, first_and_last, torch.tensor([2.0, -2.0], dtype=torch.float64)).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0] > 0 > logits.grad[1]


def test_cross_entropy_is_least_at_the_rank() -> None:
    ranks = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    logits = torch.logit(ranks).requires_grad_()
    BinaryCrossEntropy()(logits, ranks, ranks).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12


def test_thresholds_of_levels_are_learned_and_stay_in_order() -> None:
    loss = Ordinal(6)
    torch.testing.assert_close(loss.thresholds().detach().sigmoid(), torch.arange(1, 6) / 6)
    optimizer = torch.optim.SGD(loss.parameters(), lr=3.0)
    ranks = torch.rand(500, generator=torch.Generator().manual_seed(0)).square()  # low ranks are the most common
    for _ in range(200):
        optimizer.zero_grad()
        loss(torch.zeros(500), ranks, ranks).mean().backward()
        optimizer.step()
    result = loss.thresholds().detach()
    assert (result.diff() > 0).all()
    # With a logit of 0 for all, σ(-θ_k) becomes the share of ranks at level k or above.
    shares = torch.stack([(ranks >= k / 6).float().mean() for k in range(1, 6)])
    torch.testing.assert_close((-result).sigmoid(), shares, atol=0.02, rtol=0)


def test_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="levels must be at least 2; given 1"):
        Ordinal(1)


def test_the_last_rank_is_of_the_last_level() -> None:
    loss = Ordinal(3).double()
    last: Tensor = loss(
        torch.tensor([50.0], dtype=torch.float64), torch.tensor([0.999], dtype=torch.float64), SCORES[0, :1]
    )
    assert float(last.detach()) < 1e-12
