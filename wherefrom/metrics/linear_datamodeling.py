"""The linear datamodeling score: do sums of scores predict the losses of models trained on random subsets?"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from wherefrom.metrics.retrieval import QueryMean


class LinearDatamodelingScore(QueryMean):
    """Spearman correlation between predicted and measured losses of models trained on random subsets (TRAK, section 2).

    An image's score says how much the query's loss falls because of it, so the sum of the scores over a subset is
    compared with *minus* the loss of the model that was trained on it. It assumes that scores add up, which unlearning
    and feature methods do not promise.
    """

    def update(  # type: ignore[override]
        self, scores: Float[Tensor, "q n"], subsets: Bool[Tensor, "m n"], losses: Float[Tensor, "q m"]
    ) -> None:
        """Adds some queries.

        Args:
            scores: One score a query and training image.
            subsets: The images that each model was trained on.
            losses: The queries' losses under each model.

        Raises:
            ValueError: Shapes do not fit, fewer than three subsets are given, or a number is not finite.
        """
        queries, models = losses.shape
        if scores.shape != (queries, subsets.shape[1]) or subsets.shape[0] != models or models < 3:
            raise ValueError(
                f"{models} subsets (at least 3) of {subsets.shape[1]} images do not fit scores of shape "
                f"{tuple(scores.shape)} and losses of shape {tuple(losses.shape)}."
            )
        predicted = scores.double() @ subsets.double().T
        super().update(torch.stack([spearman_corrcoef(p, -m) for p, m in zip(predicted, losses.double(), strict=True)]))
