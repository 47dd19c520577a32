"""Retrieval metrics of a ranker against its teacher, after each validation."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from lightning_modules.ranker import LearningToRank, Predictions
from wherefrom.metrics.retrieval import MeanAveragePrecision, QueryMean, RecallAtK
from wherefrom.rankings.ranking_file import flatness_of

_FLAT = 0.7  # of cosines; a uniform distribution has 0.75, a normal one 0.64
_NARROW = 0.05  # of predicted normalised ranks; those of a whole ranking have a deviation of 0.29


class RetrievalMetrics(Callback):
    """Logs after each validation what a search by cosine finds in the whole training set (section 4.1 of the paper).

    Means over the validation queries, K standing for each k: `val/map_K`, the average precision of the ranking where
    the teacher's first k are right (`val/map_K_error`: its standard error), and `val/recall_K`, the share of these
    among the first k. Beside them `val/scale` (similar means influential only where it is negative), `val/flatness`
    (`flatness_of` the cosines) and `val/spread` (deviation of a query's predicted normalised ranks). Warns of
    predictions that are nearly uniform, and of a scale that is not negative in the end.

    Args:
        k: How many of the teacher's first are to be found; the paper's 500, 1000 and 4000 are 0.42, 0.85 and 3.4 % of
            its set.

    Raises:
        ValueError: No `k` is given, or one is not positive.
    """

    def __init__(self, k: list[int]) -> None:
        if not k or min(k) < 1:
            raise ValueError(f"RetrievalMetrics needs at least one k, all positive; given {k}.")
        self.k = k

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses other modules."""
        if not isinstance(pl_module, LearningToRank):
            raise ValueError(
                f"RetrievalMetrics belongs to LearningToRank, not to {type(pl_module).__name__}; take it out of the "
                "callbacks."
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts anew."""
        self.precision = {k: MeanAveragePrecision() for k in self.k}
        self.recall = {k: RecallAtK(k) for k in self.k}
        self.flatness, self.spread = QueryMean(), QueryMean()
        for metric in (*self.precision.values(), *self.recall.values(), self.flatness, self.spread):
            metric.to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds some queries.

        Raises:
            ValueError: The teacher scored fewer than k images.
        """
        assert isinstance(outputs, Predictions)
        scored = outputs.rows.shape[1]
        if max(self.k) > scored:
            raise ValueError(
                f"RetrievalMetrics is asked for k = {max(self.k)}, but the teacher scored {scored} images a query: "
                "choose smaller ones."
            )
        for k in self.k:
            right = torch.zeros_like(outputs.cosines, dtype=torch.bool).scatter_(1, outputs.rows[:, :k].long(), True)
            self.precision[k].update(outputs.cosines, right)
            self.recall[k].update(outputs.cosines, right)
        flatness = [flatness_of(row) for row in outputs.cosines.double().cpu().numpy()]
        self.flatness.update(torch.as_tensor(np.asarray(flatness), device=outputs.cosines.device))
        self.spread.update(outputs.logits.double().sigmoid().std(dim=1, correction=0))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the means over queries."""
        assert isinstance(pl_module, LearningToRank)
        result = {"val/scale": pl_module.ranker.scale.detach()[0]}
        for k in self.k:
            precision = self.precision[k].compute()
            result[f"val/map_{k}"], result[f"val/recall_{k}"] = precision["mean"], self.recall[k].compute()["mean"]
            if precision["count"] > 1:
                result[f"val/map_{k}_error"] = precision["error"]
        result["val/flatness"], result["val/spread"] = (each.compute()["mean"] for each in (self.flatness, self.spread))
        self.last = {name: float(value) for name, value in result.items()}
        # The metrics have been reduced over processes already.
        pl_module.log_dict({name: value.float() for name, value in result.items()}, sync_dist=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns of a ranker that should not be served."""
        assert isinstance(pl_module, LearningToRank)
        scale, last = float(pl_module.ranker.scale.detach()), getattr(self, "last", None)
        if scale >= 0:
            warnings.warn(
                f"The ranker's scale is {scale:.3g} after training: it must be negative for near to mean influential. "
                "Do not serve it; train longer, or look at the teacher.",
                stacklevel=2,
            )
        if last is not None and (last["val/flatness"] > _FLAT or last["val/spread"] < _NARROW):
            warnings.warn(
                f"The ranker's predictions are nearly uniform: flatness {last['val/flatness']:.2f} (more than {_FLAT} "
                f"is flat), deviation of the predicted ranks {last['val/spread']:.3f} (less than {_NARROW} is flat). "
                "Its order says little.",
                stacklevel=2,
            )
