"""Training of the learned ranker on a teacher's rankings (Fast Data Attribution, section 4.2)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int32
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from datamodules.teacher_rankings import RankedQueries, TeacherRankings
from lightning_modules.result import LeavesResult
from lightning_modules.schedule import stepped_per_batch
from wherefrom.distillation.losses import BinaryCrossEntropy, RankingLoss
from wherefrom.distillation.pair_blocks import PairBlock
from wherefrom.distillation.ranker import Ranker, load_ranker, save_ranker


class Predictions(NamedTuple):
    """What the ranker says of validation queries: cosines with all training images, their logits, and the answer."""

    cosines: Float[Tensor, "q n"]
    logits: Float[Tensor, "q n"]
    rows: Int32[Tensor, "q m"]


class LearningToRank(LeavesResult):
    """Trains a ranker on blocks of labelled pairs; the data module is `TeacherRankings`.

    Args:
        ranker: The ranker; its inputs are as wide as the features.
        loss: One loss a pair; None is binary cross-entropy.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the learning-rate schedule, stepped per block.
        scale: Where the ranker's scale begins. The papers begin at 1, from where it must change its sign before near
            means influential; a ranker may instead settle there, with the influential images far (ours did, on
            planted rankings: mAP below chance). From -1 the cosines must spread over all of [-1, 1] to say anything,
            which tears apart what the features knew of the nearest images. So ours begins at -10.
        bias: Where its bias begins.
        scale_lr: Learning rate of these two numbers, which have far to go where the embedding has not; None gives them
            the optimizer's.
        save_to: Folder to which the trained ranker is saved.
        init_from: A ranker's folder whose weights to start from (not a run to go on with: that is `ckpt_path`).
        rows: Training images embedded at a time for validation.

    Raises:
        ValueError: `init_from` holds a ranker of other sizes.
    """

    def __init__(
        self,
        ranker: Ranker,
        *,
        loss: RankingLoss | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,  # its default rate, 1e-3, is the paper's
        scheduler: LRSchedulerCallable | None = None,
        scale: float = -10.0,
        bias: float = 0.0,
        scale_lr: float | None = 1e-2,
        save_to: str | None = None,
        init_from: str | None = None,
        rows: int = 8192,
    ) -> None:
        super().__init__()
        self.ranker, self.loss = ranker, loss if loss is not None else BinaryCrossEntropy()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.scale_lr, self.save_to, self.init_from, self.rows = scale_lr, save_to, init_from, rows
        self.start_features: list[str] | None = None
        torch.nn.init.constant_(ranker.scale, scale)
        torch.nn.init.constant_(ranker.bias, bias)
        if init_from is not None:
            start, self.start_features = load_ranker(Path(init_from))
            if start.sizes != ranker.sizes:
                raise ValueError(
                    f"init_from {init_from} holds a ranker of sizes {start.sizes}; this one has {ranker.sizes}. Make "
                    "them equal, or leave init_from out."
                )
            ranker.load_state_dict(start.state_dict())

    def setup(self, stage: str) -> None:
        """Refuses features that the ranker does not take.

        Raises:
            ValueError: The data module is another one, or its features are not the ranker's.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TeacherRankings):
            raise ValueError(f"LearningToRank learns from TeacherRankings, not from {type(data).__name__}.")
        self.data = data
        width = data.training_features().shape[1]
        if width != self.ranker.inputs:
            raise ValueError(
                f"The features {', '.join(data.features)} of {data.folder} are {width} wide, but the ranker takes "
                f"{self.ranker.inputs}: set model.init_args.ranker.init_args.inputs to {width}."
            )
        if self.start_features not in (None, data.features):
            raise ValueError(
                f"init_from {self.init_from} takes the features {self.start_features}; the data module gives "
                f"{data.features}. Name the same ones in the same order."
            )

    def losses(self, block: PairBlock) -> Float[Tensor, "q c"]:
        """One loss a pair; dropout depends only on the block's key."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(block.key)
            logits = self.ranker(block.queries, block.images)
        losses: Tensor = self.loss(logits, block.ranks, block.scores)
        return losses

    def training_step(self, block: PairBlock) -> Tensor:
        """The weighted sum of the block's losses: the mean loss of the papers' pairs, on average over draws.

        Raises:
            ValueError: The loss is not finite.
        """
        loss = (self.losses(block) * block.weights).sum()
        if not torch.isfinite(loss):
            raise ValueError(
                f"The training loss is {loss.item()} at step {self.global_step}. Lower the learning rate or set "
                "gradient_clip_val; checkpoints written before this step are whole."
            )
        self.log("train/loss", loss, prog_bar=True, batch_size=len(block.queries))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Embeds the training images once for all queries."""
        self.images = self.ranker.embed_all(self.data.training_features(), self.rows)

    def validation_step(self, batch: RankedQueries) -> Predictions:  # type: ignore[override]  # callbacks are handed it
        """Logs the loss of all pairs that the teacher scored; callbacks evaluate the ranking."""
        cosines = self.ranker.embed(batch.queries) @ self.images.T
        logits = self.ranker.logits(cosines)
        count = batch.rows.shape[1]
        ranks = torch.arange(count, device=logits.device, dtype=logits.dtype) / count
        losses = self.loss(logits.gather(1, batch.rows.long()), ranks.expand_as(batch.scores), batch.scores)
        self.log("val/loss", losses.mean(), prog_bar=True, batch_size=len(batch.queries), sync_dist=True)
        return Predictions(cosines, logits, batch.rows)

    def on_validation_epoch_end(self) -> None:
        """Lets the embeddings go."""
        del self.images

    def configure_optimizers(self):  # type: ignore[no-untyped-def]  # noqa: ANN201
        """The injected optimizer, with the injected schedule stepped per block."""
        numbers = [self.ranker.scale, self.ranker.bias]
        others = [each for each in self.parameters() if all(each is not number for number in numbers)]
        own = {} if self.scale_lr is None else {"lr": self.scale_lr}
        optimizer = self.optimizer([{"params": others}, {"params": numbers, **own}])
        return stepped_per_batch(optimizer, self.scheduler)

    def save_result(self) -> None:
        """Saves the ranker, with what it was trained on."""
        if self.save_to is None or not self.trainer.is_global_zero:
            return
        data, metrics = self.data, self.trainer.callback_metrics
        record: dict[str, Any] = {
            "teacher": dict(data.train_set.identity),
            "queries": len(data.train_set.queries),
            "candidates": data.device_pairs.used,
            "outside": data.outside,
            "loss": type(self.loss).__name__,
            "init_from": self.init_from,
            "seed": data.seed,
            "seed_everything": os.environ.get("PL_GLOBAL_SEED"),
            "steps": self.global_step,
            "scale": float(self.ranker.scale.detach()),
            "metrics": {name: float(value) for name, value in metrics.items() if name.startswith("val/")},
        }
        save_ranker(Path(self.save_to), self.ranker, data.features, training=record)
