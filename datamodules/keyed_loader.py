"""Batches of keyed visits, which resume from the trainer's step."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from wherefrom.training.keyed_batches import KeyedBatches


def _whole(batch: object) -> object:
    return batch  # the data set already answers with whole batches


class KeyedLoader(DataLoader[Any]):
    """Batches of visits. Its stream starts at the trainer's step, so it resumes without any state of its own.

    Args:
        data: Answers with whole batches.
        batches: The keyed stream.
    """

    def __init__(self, data: Any, batches: KeyedBatches) -> None:
        super().__init__(data, batch_sampler=batches, collate_fn=_whole)

    def state_dict(self) -> dict[str, int]:
        """Nothing: the step is in the checkpoint already."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing: see the class."""
