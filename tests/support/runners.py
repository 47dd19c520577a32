"""Stand-ins for several processes: one whose others are not there, and threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wherefrom.runtime.distributed import Runner


@dataclass(frozen=True)
class Alone(Runner):
    """One of several processes, whose others are not there: it waits for nobody."""

    def barrier(self) -> None:
        pass

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor + 1  # the first process says that there is work


@dataclass(frozen=True)
class Together(Runner):
    """One of several threads in the place of processes."""

    meeting: threading.Barrier | None = None
    summands: list[Tensor] = field(default_factory=list)

    def barrier(self) -> None:
        assert self.meeting is not None
        self.meeting.wait(timeout=60)

    def sum(self, tensor: Tensor) -> Tensor:
        self.summands.append(tensor)
        self.barrier()
        return torch.stack(self.summands).sum()
