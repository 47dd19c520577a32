"""Linear datamodeling score (LDS): correlation of summed scores with losses of models trained on random subsets."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from wherefrom.metrics.retrieval import QueryMean


class LinearDatamodelingScore(QueryMean):
    """Spearman correlation between predicted and measured losses of models trained on random subsets (TRAK, section 2).

    An image's score estimates how much it lowers the query's loss, so the sum of the scores over a subset is compared
    with *minus* the loss of the model trained on it. This assumes that scores are additive, which unlearning and
    feature methods do not guarantee.
    """

    def update(  # type: ignore[override]
        self, scores: Float[Tensor, "q n"], subsets: Bool[Tensor, "m n"], losses: Float[Tensor, "q m"]
    ) -> None:
        """Accumulates the values of some queries.

        Args:
            scores: One score per query and training image.
            subsets: Images that each model was trained on.
            losses: Losses of the queries under each model.

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
