"""Retrieval metrics (mAP, Recall@k): one value per query, then their mean and standard error.

Images that a method scores alike have no order: a value is then its mean over all orders of them (`metrics.ties`).

All are torchmetrics: updated batch by batch, and reduced over devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

from wherefrom.metrics.ties import average_precision, recall


class QueryMean(Metric):
    """Mean over queries, its standard error, and the number of queries.

    `compute` gives `mean`, `error` (NaN for a single query) and `count`.
    """

    full_state_update = False
    higher_is_better = True
    values: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Float[Tensor, " q"]) -> None:
        """Accumulates the values of some queries.

        Raises:
            ValueError: A value is not finite.
        """
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{type(self).__name__} needs finite values; given {values.tolist()}.")
        self.values.append(values.double().flatten())

    def compute(self) -> dict[str, Tensor]:
        """Computes mean, standard error and count.

        Raises:
            ValueError: There were no queries.
        """
        values = torch.cat([value.flatten() for value in self.values]) if len(self.values) else torch.empty(0)
        if len(values) == 0:
            raise ValueError(f"{type(self).__name__} has seen no query.")
        error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(float("nan"))
        return {"mean": values.mean(), "error": error, "count": torch.tensor(len(values))}


def top_of(teacher: Float[Tensor, "q n"], k: int) -> Bool[Tensor, "q n"]:
    """Marks the k images that a teacher ranks highest; a tie at the edge is broken by a fixed shuffle of positions.

    Raises:
        ValueError: There are not that many images.
    """
    if not 1 <= k <= teacher.shape[1]:
        raise ValueError(f"k must lie between 1 and the {teacher.shape[1]} images that are ranked; given {k}.")
    # By position, a ranking in the data's own order would agree with a teacher that tells no images apart.
    shuffle = torch.randperm(teacher.shape[1], generator=torch.Generator().manual_seed(0)).to(teacher.device)
    order = shuffle[torch.argsort(teacher[:, shuffle], dim=1, descending=True, stable=True)[:, :k]]
    return torch.zeros_like(teacher, dtype=torch.bool).scatter_(1, order, True)


def ranked(
    scores: Float[Tensor, "q n"], relevant: Bool[Tensor, "q n"]
) -> tuple[Bool[Tensor, "q n"], Bool[Tensor, "q n"]]:
    """Sorts the relevance mask by descending score, and marks the places whose score is that of the place before.

    Raises:
        ValueError: Shapes differ, a score is not finite, or a query has no relevant image.
    """
    if scores.shape != relevant.shape or scores.dim() != 2:
        raise ValueError(
            f"Scores and relevance must both be (queries, images); they are {tuple(scores.shape)} and "
            f"{tuple(relevant.shape)}."
        )
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("A score is not finite; rankings need finite scores.")
    if not bool(relevant.any(dim=1).all()):
        raise ValueError("A query has no relevant image, so retrieval cannot be measured; leave it out.")
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    values, tied = scores.gather(1, order), torch.zeros_like(relevant)
    tied[:, 1:] = values[:, 1:] == values[:, :-1]
    return relevant.gather(1, order), tied


class MeanAveragePrecision(QueryMean):
    """Mean average precision of rankings of the whole set (Fast Data Attribution, section 4.1).

    With `top_of(teacher, k)` as the relevant images it is the papers' mAP(k). Scores that are all equal have that of
    a random order.
    """

    def update(self, scores: Float[Tensor, "q n"], relevant: Bool[Tensor, "q n"]) -> None:  # type: ignore[override]
        """Accumulates the values of some queries.

        Raises:
            ValueError: Shapes differ, a score is not finite, or a query has no relevant image.
        """
        super().update(average_precision(*ranked(scores, relevant)))


class RecallAtK(QueryMean):
    """Recall@k: mean over queries of the share of relevant images among the first k.

    Args:
        k: Number of ranks that count.

    Raises:
        ValueError: `k` is not positive.
    """

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"k must be at least 1; given {k}.")
        self.k = k

    def update(self, scores: Float[Tensor, "q n"], relevant: Bool[Tensor, "q n"]) -> None:  # type: ignore[override]
        """Accumulates the values of some queries.

        Raises:
            ValueError: Shapes differ, a score is not finite, a query has no relevant image, or `k` exceeds the set.
        """
        if self.k > scores.shape[-1]:
            raise ValueError(f"k is {self.k}, but only {scores.shape[-1]} images are ranked.")
        super().update(recall(*ranked(scores, relevant), self.k))


@dataclass(frozen=True)
class Cutoff:
    """Cutoff k of a retrieval metric: the number of images that count as relevant.

    Attributes:
        number: Number of images.
        share: The requested share of the training set, if k was given as one.
    """

    number: int
    share: float | None = None

    @classmethod
    def of(cls, k: float, images: int) -> Cutoff:
        """Parses k: a number of images from 1 on, or a share of them below 1.

        Raises:
            ValueError: It is neither, or exceeds the number of images.
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
