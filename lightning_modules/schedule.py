"""An optimizer with its schedule, as Lightning wants them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import Optimizer


def stepped_per_batch(optimizer: Optimizer, scheduler: LRSchedulerCallable | None) -> Any:
    """What `configure_optimizers` returns: the optimizer, with the schedule, if any, stepped per batch."""
    if scheduler is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler(optimizer), "interval": "step"}}
