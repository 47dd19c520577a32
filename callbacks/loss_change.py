"""Loss change of the query and of held-out images while a query is unlearned."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_modules.unlearning import Unlearning
from wherefrom.runtime.ranges import check_ranges


class LossChange(Callback):
    """Logs, after each step of unlearning, how much the loss of the query and of held-out images has changed.

    A good step raises the query's loss and leaves the others alone.

    Args:
        every_n_steps: Steps between measurements of the held-out images.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        check_ranges(every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses other modules."""
        if not isinstance(pl_module, Unlearning):
            raise ValueError(
                f"LossChange belongs to Unlearning, not to {type(pl_module).__name__}; take it out of the callbacks."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the losses before the first step."""
        assert isinstance(pl_module, Unlearning)
        self.before = pl_module.set_loss(pl_module.images.validation_latents)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the changes since the first step."""
        assert isinstance(pl_module, Unlearning)
        losses = pl_module.unlearner.losses
        pl_module.log("loss_change/query", losses[-1] - losses[0], on_step=True)
        if (batch_idx + 1) % self.every_n_steps == 0:
            after = pl_module.set_loss(pl_module.images.validation_latents)
            pl_module.log("loss_change/held_out", (after - self.before).mean(), on_step=True)
