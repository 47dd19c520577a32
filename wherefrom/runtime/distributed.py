"""Where a computation runs: one process, or one of several that share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def best_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class Runner:
    """One process's place among those that work together.

    Attributes:
        device: Where this process computes.
        rank: This process, from 0.
        world_size: Number of processes. With more than one, `torch.distributed` must be initialised.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls, device: torch.device | None = None) -> Runner:
        """The place that `torch.distributed` gives this process, or the only process."""
        device = best_device() if device is None else device
        if dist.is_available() and dist.is_initialized():
            return cls(device, dist.get_rank(), dist.get_world_size())
        return cls(device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is shared."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in float64 while it is on its way."""
        if self.world_size == 1:
            return tensor
        total = tensor.double()
        dist.all_reduce(total)
        return total.to(tensor.dtype)
