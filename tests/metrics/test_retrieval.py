"""Metrics against torchmetrics' own, scipy and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import sem, spearmanr
from torchmetrics.retrieval import RetrievalMAP, RetrievalRecall

from wherefrom.metrics.linear_datamodeling import LinearDatamodelingScore
from wherefrom.metrics.retrieval import MeanAveragePrecision, QueryMean, RecallAtK, top_of

RANDOM = torch.Generator().manual_seed(0)
SCORES = torch.rand(6, 40, generator=RANDOM, dtype=torch.float64)  # torchmetrics leaves out what is not positive
TEACHER = torch.randn(6, 40, generator=RANDOM, dtype=torch.float64)
RELEVANT = top_of(TEACHER, 7)
INDEXES = torch.arange(6)[:, None].expand(6, 40)


def test_mean_and_standard_error_over_blocks() -> None:
    metric, values = QueryMean(), torch.randn(11, generator=RANDOM, dtype=torch.float64)
    for block in values.split(4):
        metric.update(block)
    result = metric.compute()
    assert float(result["mean"]) == pytest.approx(float(values.mean()), rel=1e-12)
    assert float(result["error"]) == pytest.approx(float(sem(values.numpy())), rel=1e-12)
    assert int(result["count"]) == 11
    single = QueryMean()
    single.update(values[:1])
    assert np.isnan(float(single.compute()["error"]))


def test_average_precision_is_torchmetrics_own() -> None:
    metric = MeanAveragePrecision()
    metric.update(SCORES[:2], RELEVANT[:2])
    metric.update(SCORES[2:], RELEVANT[2:])
    expected = RetrievalMAP()(SCORES.flatten(), RELEVANT.flatten(), indexes=INDEXES.flatten())
    assert float(metric.compute()["mean"]) == pytest.approx(float(expected), rel=1e-6)


def test_average_precision_by_hand() -> None:
    metric = MeanAveragePrecision()
    metric.update(torch.tensor([[9.0, 8.0, 7.0, 6.0]]), torch.tensor([[True, False, True, False]]))
    assert float(metric.compute()["mean"]) == pytest.approx((1 / 1 + 2 / 3) / 2)
    metric.reset()
    metric.update(torch.tensor([[5.0, 5.0]]), torch.tensor([[False, True]]))
    assert float(metric.compute()["mean"]) == 0.75, "ties are taken in all orders"


@pytest.mark.parametrize("k", [1, 5, 40])
def test_recall_is_torchmetrics_own(k: int) -> None:
    metric = RecallAtK(k)
    metric.update(SCORES, RELEVANT)
    expected = RetrievalRecall(top_k=k)(SCORES.flatten(), RELEVANT.flatten(), indexes=INDEXES.flatten())
    assert float(metric.compute()["mean"]) == pytest.approx(float(expected), rel=1e-6)


def test_what_a_teacher_ranks_highest() -> None:
    assert RELEVANT.sum(dim=1).tolist() == [7] * 6
    for row, teacher in zip(RELEVANT, TEACHER, strict=True):
        assert teacher[row].min() > teacher[~row].max()
    assert top_of(torch.zeros(1, 3), 2).sum() == 2
    with pytest.raises(ValueError, match="k must lie between 1 and the 40 images that are ranked; given 41"):
        top_of(TEACHER, 41)


def test_the_linear_datamodeling_score_of_a_linear_model_with_exact_influence_is_one() -> None:
    # A loss that is a sum over what the model saw, each image's part known exactly.
    influence = torch.randn(3, 40, generator=RANDOM, dtype=torch.float64)
    subsets = torch.rand(32, 40, generator=RANDOM) < 0.5
    losses = 5.0 - influence @ subsets.double().T
    metric = LinearDatamodelingScore()
    metric.update(influence, subsets, losses)
    assert float(metric.compute()["mean"]) == pytest.approx(1.0)
    metric.reset()
    metric.update(-influence, subsets, losses)
    assert float(metric.compute()["mean"]) == pytest.approx(-1.0)


def test_the_linear_datamodeling_score_is_scipys_spearman() -> None:
    subsets = torch.rand(16, 40, generator=RANDOM) < 0.5
    losses = torch.randn(6, 16, generator=RANDOM, dtype=torch.float64)
    metric = LinearDatamodelingScore()
    metric.update(SCORES[:4], subsets, losses[:4])
    metric.update(SCORES[4:], subsets, losses[4:])
    sums = (SCORES @ subsets.double().T).numpy()
    expected = [float(spearmanr(a, -b).statistic) for a, b in zip(sums, losses.numpy(), strict=True)]
    result = metric.compute()
    assert float(result["mean"]) == pytest.approx(np.mean(expected), rel=1e-6)
    assert float(result["error"]) == pytest.approx(float(sem(expected)), rel=1e-6)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="has seen no query"), pytest.warns(UserWarning, match="before the ``update``"):
        QueryMean().compute()
    with pytest.raises(ValueError, match="needs finite values"):
        QueryMean().update(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="k must be at least 1; given 0"):
        RecallAtK(0)
    with pytest.raises(ValueError, match="k is 41, but only 40 images are ranked"):
        RecallAtK(41).update(SCORES, RELEVANT)
    with pytest.raises(ValueError, match=r"must both be \(queries, images\)"):
        MeanAveragePrecision().update(SCORES, RELEVANT[:2])
    with pytest.raises(ValueError, match="A score is not finite"):
        MeanAveragePrecision().update(SCORES * float("inf"), RELEVANT)
    with pytest.raises(ValueError, match="no relevant image"):
        MeanAveragePrecision().update(SCORES, torch.zeros_like(RELEVANT))
    with pytest.raises(ValueError, match=r"2 subsets \(at least 3\) of 40 images do not fit"):
        LinearDatamodelingScore().update(SCORES, RELEVANT[:2], SCORES[:, :2])
