"""What rankings and retrained models are judged by: one value a query, then their mean and its standard error.

All are torchmetrics: they are updated block by block, and reduce over devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric


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

    def update(self, values: Float[Tensor, " q"]) -> None:
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
        result = torch.cat([value.flatten() for value in self.values]) if len(self.values) else torch.empty(0)
        if len(result) == 0:
            raise ValueError(f"{type(self).__name__} has seen no query.")
        error = result.std() / len(result) ** 0.5 if len(result) > 1 else torch.tensor(float("nan"))
        return {"mean": result.mean(), "error": error, "count": torch.tensor(len(result))}


def top_of(teacher: Float[Tensor, "q n"], k: int) -> Bool[Tensor, "q n"]:
    """The k images that a teacher ranks highest, ties by position.

    Raises:
        ValueError: There are not that many images.
    """
    if not 1 <= k <= teacher.shape[1]:
        raise ValueError(f"k must lie between 1 and the {teacher.shape[1]} images that are ranked; given {k}.")
    order = torch.argsort(teacher, dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(teacher, dtype=torch.bool).scatter_(1, order, True)


def _ranked(scores: Float[Tensor, "q n"], relevant: Bool[Tensor, "q n"]) -> Bool[Tensor, "q n"]:
    """What is relevant, in the order of the scores."""
    if scores.shape != relevant.shape or scores.dim() != 2:
        raise ValueError(
            f"Scores and what is relevant must be (queries, images) alike; they are {tuple(scores.shape)} and "
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
            raise ValueError(f"k is {self.k}, but only {scores.shape[-1]} images are ranked.")
        hits = _ranked(scores, relevant)
        super().update(hits[:, : self.k].sum(dim=1).double() / hits.sum(dim=1))


@dataclass(frozen=True)
class Depth:
    """How many of the teacher's images are to be found.

    Attributes:
        number: So many.
        share: What was asked for, if it was a share of the training set.
    """

    number: int
    share: float | None = None

    @classmethod
    def of(cls, k: float, images: int) -> Depth:
        """A number of images from 1 on, or a share of them below 1.

        Raises:
            ValueError: It is neither, or more than there are.
        """
        if 0 < k < 1:
            return cls(max(1, round(k * images)), k)
        if k < 1 or k != int(k) or k > images:
            raise ValueError(
                f"k must be a share between 0 and 1 or a whole number from 1 to {images}, the number of training "
                f"images; given {k}."
            )
        return cls(int(k))

    def __str__(self) -> str:
        return str(self.number) if self.share is None else f"{self.number} = {self.share:.2%}"
