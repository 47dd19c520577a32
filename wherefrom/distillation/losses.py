"""Losses of learning to rank (Fast Data Attribution, section 4.2): one value a labelled pair of a query and an image.

All take the ranker's logits, low where an image is influential, so that every one of them makes the ranker's scale
negative: similar means influential.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class RankingLoss(nn.Module, ABC):
    """What a ranker is trained to lower; what it learns itself is trained along."""

    @abstractmethod
    def forward(
        self, logits: Float[Tensor, "..."], ranks: Float[Tensor, "..."], scores: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """One loss a pair.

        Args:
            logits: The ranker's, low where influential.
            ranks: Normalised ranks by the teacher in [0, 1), 0 the most influential.
            scores: The teacher's scores, standardised for each query, high where influential.
        """


class BinaryCrossEntropy(RankingLoss):
    """Cross-entropy of the sigmoid of the logit against the normalised rank: the method's choice.

    Its least value for a rank r is r's own entropy, not 0; the logit there is log(r / (1 - r)).
    """

    def forward(
        self, logits: Float[Tensor, "..."], ranks: Float[Tensor, "..."], scores: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """One loss a pair."""
        return F.binary_cross_entropy_with_logits(logits, ranks, reduction="none")


class SquaredError(RankingLoss):
    """Squared difference of the sigmoid of the logit and the normalised rank."""

    def forward(
        self, logits: Float[Tensor, "..."], ranks: Float[Tensor, "..."], scores: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """One loss a pair."""
        return (logits.sigmoid() - ranks).square()


class Ordinal(RankingLoss):
    """Ordinal regression: a cumulative logit model (proportional odds) of levels of equal width.

    A rank r is at level y = ⌊r · levels⌋; P(y ≥ k) = σ(logit - θ_k) for k = 1 … levels - 1, and the loss is the mean
    over k of the cross-entropies of "is y ≥ k". The thresholds θ are learned, and stay in order because their
    differences are exponentials. They begin where the levels of σ⁻¹(r) lie. Ours: one logit and thresholds that all
    queries share, so that unlike the paper's variant the ranker can still be served by a search for the nearest.

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
        """θ, in order."""
        return torch.cat([self.first, self.log_gaps.exp()]).cumsum(0)

    def forward(
        self, logits: Float[Tensor, "..."], ranks: Float[Tensor, "..."], scores: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """One loss a pair."""
        level = (ranks * self.levels).floor()  # one threshold at a time: blocks are large
        total = torch.zeros_like(logits)
        for index, threshold in enumerate(self.thresholds(), start=1):
            reached = (level >= index).to(logits.dtype)
            total = total + F.binary_cross_entropy_with_logits(logits - threshold, reached, reduction="none")
        return total / (self.levels - 1)


class Regression(RankingLoss):
    """Squared difference of the logit and minus the standardised score: what the paper shows to fail."""

    def forward(
        self, logits: Float[Tensor, "..."], ranks: Float[Tensor, "..."], scores: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """One loss a pair."""
        return (logits + scores).square()
