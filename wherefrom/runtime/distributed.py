"""Where a computation runs: one process, or one of several that share it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


def parse_device(name: str | None) -> torch.device:
    """The device of that name, or the best one there is.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, `mps`; None takes CUDA where there is one, else the CPU.

    Raises:
        ValueError: There is no such device on this machine.
    """
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ValueError(f"device: there is no {name!r} on this machine; there is {', '.join(there)}.") from error
    return device


@contextmanager
def launched(device: str | None = None) -> Iterator[Runner]:
    """This process's place, joining the others where `torchrun` started several.

    Args:
        device: See `parse_device`; under `torchrun` `cuda` means this process's own GPU.

    Raises:
        ValueError: There is no such device, or there are more processes on a machine than GPUs.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or dist.is_initialized():
        yield Runner.current(parse_device(device))
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started process {local + 1} on a machine with {torch.cuda.device_count()} GPUs: give "
                "--nproc-per-node at most that, or --device cpu."
            )
        torch.cuda.set_device(local)
    place = torch.device("cuda", local) if on_gpu else parse_device(device or "cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Runner.current(place)
    finally:
        dist.destroy_process_group()
