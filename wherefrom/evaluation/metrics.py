"""What rankings and retrained models are judged by: one value a query, then their mean and its standard error.

All are torchmetrics: they are updated block by block, and reduce over devices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.regression import spearman_corrcoef


def estimate(values: Float[NDArray[np.float64], "q"]) -> tuple[float, float]:
    """Mean and standard error of what is a number."""
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return float("nan"), float("nan")
    return float(known.mean()), float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")


class QueryMean(Metric):
    """Mean over queries, its standard error, and how many there were.

    `compute` gives `mean`, `error` (NaN for a single query) and `count`.
    """

    full_state_update = False
    higher_is_better = True
    values: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Float[Tensor, "q"]) -> None:
        """Adds the values of some queries.

        Raises:
            ValueError: A value is not finite.
        """
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{type(self).__name__} needs finite values; given {values.tolist()}.")
        self.values.append(values.double().flatten())

    def compute(self) -> dict[str, Tensor]:
        """Mean, standard error and count.

        Raises:
            ValueError: There were no queries.
        """
        found = torch.cat([value.flatten() for value in self.values]) if len(self.values) else torch.empty(0)
        if len(found) == 0:
            raise ValueError(f"{type(self).__name__} has seen no query.")
        error = found.std() / len(found) ** 0.5 if len(found) > 1 else torch.tensor(float("nan"))
        return {"mean": found.mean(), "error": error, "count": torch.tensor(len(found))}


def top_of(teacher: Float[Tensor, "q n"], k: int) -> Bool[Tensor, "q n"]:
    """The k pictures that a teacher ranks highest, ties by position.

    Raises:
        ValueError: There are not that many pictures.
    """
    if not 1 <= k <= teacher.shape[1]:
        raise ValueError(f"k must lie between 1 and the {teacher.shape[1]} pictures that are ranked; given {k}.")
    order = torch.argsort(teacher, dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(teacher, dtype=torch.bool).scatter_(1, order, True)


def _ranked(scores: Float[Tensor, "q n"], relevant: Bool[Tensor, "q n"]) -> Bool[Tensor, "q n"]:
    """What is relevant, in the order of the scores."""
    if scores.shape != relevant.shape or scores.dim() != 2:
        raise ValueError(
            f"Scores and what is relevant must be (queries, pictures) alike; they are {tuple(scores.shape)} and "
            f"{tuple(relevant.shape)}."
        )
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("A score is not finite; rankings need finite scores.")
    if not bool(relevant.any(dim=1).all()):
        raise ValueError("A query has nothing relevant, so nothing can be found; leave it out.")
    return relevant.gather(1, torch.argsort(scores, dim=1, descending=True, stable=True))


class MeanAveragePrecision(QueryMean):
    """Mean over queries of the average precision of a ranking of the whole set (Fast Data Attribution, section 4.1).

    With `top_of(teacher, k)` as what is relevant it is the papers' mAP(k).
    """

    def update(self, scores: Float[Tensor, "q n"], relevant: Bool[Tensor, "q n"]) -> None:  # type: ignore[override]
        """Adds some queries.

        Raises:
            ValueError: Shapes differ, a score is not finite, or a query has nothing relevant.
        """
        hits = _ranked(scores, relevant).double()
        precision = hits.cumsum(dim=1) / torch.arange(1, hits.shape[1] + 1, device=hits.device)
        super().update((precision * hits).sum(dim=1) / hits.sum(dim=1))


class RecallAtK(QueryMean):
    """Mean over queries of the share of what is relevant that is among the first k.

    Args:
        k: How many places count.

    Raises:
        ValueError: `k` is not positive.
    """

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"k must be at least 1; given {k}.")
        self.k = k

    def update(self, scores: Float[Tensor, "q n"], relevant: Bool[Tensor, "q n"]) -> None:  # type: ignore[override]
        """Adds some queries.

        Raises:
            ValueError: Shapes differ, a score is not finite, a query has nothing relevant, or `k` is larger than the
                set.
        """
        if self.k > scores.shape[-1]:
            raise ValueError(f"k is {self.k}, but only {scores.shape[-1]} pictures are ranked.")
        hits = _ranked(scores, relevant)
        super().update(hits[:, : self.k].sum(dim=1).double() / hits.sum(dim=1))


class LinearDatamodelingScore(QueryMean):
    """Spearman correlation between predicted and measured losses of models trained on random subsets (TRAK, section 2).

    A picture's score says how much the query's loss falls because of it, so the sum of the scores over a subset is
    compared with *minus* the loss of the model that was trained on it. It assumes that scores add up, which unlearning
    and feature methods do not promise.
    """

    def update(  # type: ignore[override]
        self, scores: Float[Tensor, "q n"], subsets: Bool[Tensor, "m n"], losses: Float[Tensor, "q m"]
    ) -> None:
        """Adds some queries.

        Args:
            scores: One score a query and training picture.
            subsets: The pictures that each model was trained on.
            losses: The queries' losses under each model.

        Raises:
            ValueError: Shapes do not fit, fewer than three subsets are given, or a number is not finite.
        """
        queries, models = losses.shape
        if scores.shape != (queries, subsets.shape[1]) or subsets.shape[0] != models or models < 3:
            raise ValueError(
                f"{models} subsets (at least 3) of {subsets.shape[1]} pictures do not fit scores of shape "
                f"{tuple(scores.shape)} and losses of shape {tuple(losses.shape)}."
            )
        predicted = scores.double() @ subsets.double().T
        super().update(torch.stack([spearman_corrcoef(p, -m) for p, m in zip(predicted, losses.double(), strict=True)]))
