"""Linear datamodeling score (LDS): correlation of summed scores with losses of models trained on random subsets."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from wherefrom.metrics.retrieval import QueryMean
from wherefrom.metrics.ties import is_constant, sums_are_constant


class LinearDatamodelingScore(QueryMean):
    """Spearman correlation between predicted and measured losses of models trained on random subsets (TRAK, section 2).

    An image's score estimates how much it lowers the query's loss, so the sum of the scores over a subset is compared
    with *minus* the loss of the model trained on it. This assumes that scores are additive, which unlearning and
    feature methods do not guarantee.

    A query whose sums, or whose losses, are all equal as far as rounding can tell has no correlation: its value is NaN,
    and `compute` leaves it out and says how many there were, as `undefined`.
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
        if not bool(torch.isfinite(scores).all()) or not bool(torch.isfinite(losses).all()):
            raise ValueError(f"{type(self).__name__} needs finite scores and losses.")
        predicted = scores.double() @ subsets.double().T
        result = []
        for row, (sums, measured) in enumerate(zip(predicted, losses.double(), strict=True)):
            constant = sums_are_constant(sums, scores[row], subsets) or is_constant(losses[row])
            result.append(sums.new_tensor(float("nan")) if constant else spearman_corrcoef(sums, -measured).double())
        self.values.append(torch.stack(result))

    def compute(self) -> dict[str, Tensor]:
        """Computes mean, standard error and count of the defined values, and how many are `undefined`.

        Raises:
            ValueError: There were no queries.
        """
        values = torch.cat([value.flatten() for value in self.values]) if len(self.values) else torch.empty(0)
        if len(values) == 0:
            raise ValueError(f"{type(self).__name__} has seen no query.")
        known = values[~values.isnan()]
        nan = torch.tensor(float("nan"), dtype=values.dtype)
        return {
            "mean": known.mean() if len(known) else nan,
            "error": known.std() / len(known) ** 0.5 if len(known) > 1 else nan,
            "count": torch.tensor(len(known)),
            "undefined": torch.tensor(len(values) - len(known)),
        }
