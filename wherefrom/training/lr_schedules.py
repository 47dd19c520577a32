"""Learning-rate schedules."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupStableDecay(LambdaLR):
    """Warmup-stable-decay schedule: linear warm-up, a constant rate, then a decay to zero as 1 - √progress.

    Until the decay begins the run does not depend on its length, so a run can be extended from a checkpoint and
    still be the run that its configuration describes (Hägele et al., "Scaling laws and compute-optimal training beyond
    fixed training durations", 2024).

    Args:
        optimizer: The optimizer; its learning rate is the peak rate.
        total_steps: Length of the run in steps.
        warmup_steps: Length of the warm-up in steps.
        decay_steps: Length of the decay in steps.

    Raises:
        ValueError: Warm-up and decay do not fit into the run.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int, decay_steps: int) -> None:
        if warmup_steps + decay_steps > total_steps:
            raise ValueError(
                f"warmup_steps {warmup_steps} and decay_steps {decay_steps} do not fit into total_steps {total_steps}."
            )

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            left = min(max(total_steps - step, 0), decay_steps)
            return 1.0 - (1.0 - left / decay_steps) ** 0.5 if decay_steps and left < decay_steps else 1.0

        super().__init__(optimizer, factor)
