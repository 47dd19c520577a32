"""Learning-to-rank losses (Fast Data Attribution, section 4.2): one value per labelled (query, image) pair.

All take the ranker's logits, low where an image is influential, so each of them makes the ranker's scale negative:
similar means influential.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class RankingLoss(nn.Module, ABC):
    """Base class of ranking losses; their own parameters are trained with the ranker."""

    @abstractmethod
    def forward(
        self, logits: Float[Tensor, "..."], ranks: Float[Tensor, "..."], scores: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Computes one loss per pair.

        Args:
            logits: Logits of the ranker, low where influential.
            ranks: Normalised ranks of the teacher in [0, 1), 0 the most influential.
            scores: Scores of the teacher, standardised per query, high where influential.
        """


class BinaryCrossEntropy(RankingLoss):
    """Cross-entropy between the sigmoid of the logit and the normalised rank: the paper's default.

    Its minimum for a rank r is the entropy of r, not 0, at the logit log(r / (1 - r)).
    """

    def forward(
        self, logits: Float[Tensor, "..."], ranks: Float[Tensor, "..."], scores: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Computes one loss per pair."""
        return F.binary_cross_entropy_with_logits(logits, ranks, reduction="none")


class SquaredError(RankingLoss):
    """Squared difference of the sigmoid of the logit and the normalised rank."""

    def forward(
        self, logits: Float[Tensor, "..."], ranks: Float[Tensor, "..."], scores: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Computes one loss per pair."""
        return (logits.sigmoid() - ranks).square()


class Ordinal(RankingLoss):
    """Ordinal regression: cumulative logit model (proportional odds) with levels of equal width.

    A rank r is at level y = ⌊r · levels⌋; P(y ≥ k) = σ(logit - θ_k) for k = 1 … levels - 1, and the loss is the mean
    over k of the cross-entropies of "is y ≥ k". The thresholds θ are learned, and stay ordered because their
    differences are exponentials. They are initialised at the levels of σ⁻¹(r). Unlike the paper's variant, all queries
    share one logit and the thresholds, so the ranker can still be served by nearest-neighbour search.

    Args:
        levels: Number of levels.

    Raises:
        ValueError: There are fewer than two levels.
    """

    def __init__(self, levels: int = 20) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels must be at least 2; given {levels}.")
        self.levels = levels
        start = torch.logit(torch.arange(1, levels) / levels)
        self.first = nn.Parameter(start[:1].clone())
        self.log_gaps = nn.Parameter(start.diff().log())

    def thresholds(self) -> Float[Tensor, " k"]:
        """Thresholds θ, ascending."""
        return torch.cat([self.first, self.log_gaps.exp()]).cumsum(0)

    def forward(
        self, logits: Float[Tensor, "..."], ranks: Float[Tensor, "..."], scores: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Computes one loss per pair."""
        level = (ranks * self.levels).floor()  # one threshold at a time: blocks are large
        total = torch.zeros_like(logits)
        for index, threshold in enumerate(self.thresholds(), start=1):
            reached = (level >= index).to(logits.dtype)
            total = total + F.binary_cross_entropy_with_logits(logits - threshold, reached, reduction="none")
        return total / (self.levels - 1)


class Regression(RankingLoss):
    """Squared difference of the logit and minus the standardised score, which the paper reports to fail."""

    def forward(
        self, logits: Float[Tensor, "..."], ranks: Float[Tensor, "..."], scores: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Computes one loss per pair."""
        return (logits + scores).square()
