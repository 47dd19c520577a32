"""Rankings by a slow teacher, from which a ranker learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32
from lightning import LightningDataModule, Trainer
from torch import Tensor

from wherefrom.distillation.pair_blocks import BlockSampler, PairBlock, TeacherPairs
from wherefrom.distillation.teacher_set import TeacherSet, read_teacher_set
from wherefrom.runtime import keyed_random
from wherefrom.runtime.salts import Salt

_SPLIT, _FEWER = Salt.TEACHER_SPLIT, Salt.TEACHER_SUBSET
_QUERIES = 16  # of a validation batch: each is compared with the whole training set


class RankedQueries(NamedTuple):
    """Validation queries: their features, and what the teacher scored, the most influential first."""

    queries: Float[Tensor, "q d"]
    rows: Int32[Tensor, "q m"]
    scores: Float[Tensor, "q m"]


class BlockLoader:
    """The blocks of an epoch, from the trainer's step on, so that it resumes without any state of its own.

    Args:
        sampler: Draws the blocks.
        trainer: Its step and its place among the processes.
    """

    def __init__(self, sampler: BlockSampler, trainer: Trainer) -> None:
        self.sampler, self.trainer, self.steps = sampler, trainer, sampler.steps()

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[PairBlock]:
        start = self.trainer.global_step
        for step in range(start, (start // self.steps + 1) * self.steps):
            yield self.sampler.block(step).share(self.trainer.global_rank, self.trainer.world_size)

    def state_dict(self) -> dict[str, int]:
        """Nothing: the step is in the checkpoint already."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing: see the class."""


class QueryLoader:
    """Validation queries, a few at a time.

    Args:
        pairs: All of them.
        rank: This process.
        world_size: Number of processes that share them.
    """

    def __init__(self, pairs: TeacherPairs, rank: int, world_size: int) -> None:
        self.pairs, self.parts = pairs, torch.arange(len(pairs.queries))[rank::world_size].split(_QUERIES)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[RankedQueries]:
        for part in self.parts:
            yield RankedQueries(self.pairs.queries[part], self.pairs.rows[part], self.pairs.scores[part])


def keyed_order(queries: Sequence[str], salt: int, seed: int) -> list[int]:
    """Positions of the queries in an order that is a hash of (seed, id)."""
    keys = keyed_random.uniform(keyed_random.combine(salt, seed, keyed_random.hash_texts(queries)))[:, 0]
    return keys.argsort(stable=True).tolist()


class TeacherRankings(LightningDataModule):
    """A teacher set in the device's memory: blocks of labelled pairs to train on, and validation queries.

    Args:
        folder: The teacher set (see `wherefrom.distillation.teacher_set`).
        features: Names of the encoders whose features are put side by side.
        validation_folder: A teacher set of the same training images whose queries are for validation; without one,
            `validation_share` of the folder's own are.
        validation_share: Share of the folder's queries held out, by a hash of (`split_seed`, query).
        queries: Train on this many of the others; more of them contain fewer. None takes all.
        candidates: Train on this many of the images that the teacher scored for a query, chosen uniformly; None
            takes all.
        first: Train as if the teacher had scored only this many images of a query, those that it ranks first: K where
            a cheap teacher scored all. None takes all.
        block_queries: Queries of a block.
        block_images: Training images of a block.
        outside: Share of images that the teacher did not score; see `BlockSampler`.
        seed: Seed of blocks and dropout, and of `queries` and `candidates`.
        split_seed: Seed of the held-out queries, so that runs of several seeds have the same.
    """

    def __init__(
        self,
        folder: str,
        *,
        features: list[str],
        validation_folder: str | None = None,
        validation_share: float = 0.1,
        queries: int | None = None,
        candidates: int | None = None,
        first: int | None = None,
        block_queries: int = 256,
        block_images: int = 512,
        outside: float = 0.1,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.folder, self.features = Path(folder), features
        self.validation_folder = None if validation_folder is None else Path(validation_folder)
        self.validation_share, self.queries, self.candidates = validation_share, queries, candidates
        self.first = first
        self.block_queries, self.block_images, self.outside = block_queries, block_images, outside
        self.seed, self.split_seed = seed, split_seed

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the teacher set.

        Raises:
            ValueError: A set is damaged, lacks features or queries, or the two are of different training images.
        """
        train, validation = self._split(read_teacher_set(self.folder, self.features))
        if self.queries is not None:
            if not 1 <= self.queries <= len(train.queries):
                raise ValueError(
                    f"queries is {self.queries}, but {self.folder} leaves {len(train.queries)} to train on: take at "
                    "most as many, at least 1, or leave it out to take all."
                )
            train = train.of_queries(sorted(keyed_order(train.queries, _FEWER, self.seed)[: self.queries]))
        train = train if self.first is None else train.first(self.first)
        self.train_set, self.validation_set = train, validation
        self.device_pairs = TeacherPairs.of(train, train.concatenated(self.features), self.candidates, self.seed)
        held_out = TeacherPairs.of(validation, validation.concatenated(self.features))
        self.validation_pairs = replace(held_out, images=self.device_pairs.images)  # the same: one copy is enough

    def _split(self, teacher: TeacherSet) -> tuple[TeacherSet, TeacherSet]:
        if self.validation_folder is not None:
            other = read_teacher_set(self.validation_folder, self.features)
            if other.images != teacher.images:
                raise ValueError(
                    f"{self.validation_folder} ranks {len(other.images)} training images, {self.folder} "
                    f"{len(teacher.images)}, and they are not the same in the same order: take queries of one set."
                )
            return teacher, other
        count = round(self.validation_share * len(teacher.queries))
        if not 1 <= count < len(teacher.queries):
            raise ValueError(
                f"validation_share {self.validation_share} of the {len(teacher.queries)} queries in {self.folder} "
                f"holds out {count}: some are needed on both sides. Change it, or give a validation_folder."
            )
        order = keyed_order(teacher.queries, _SPLIT, self.split_seed)
        return teacher.of_queries(sorted(order[count:])), teacher.of_queries(sorted(order[:count]))

    def train_dataloader(self) -> BlockLoader:
        """Blocks, drawn where the features are.

        Raises:
            ValueError: The trainer accumulates gradients.
        """
        trainer = self.trainer
        assert trainer is not None
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"accumulate_grad_batches is {trainer.accumulate_grad_batches}, but each step has one block: leave it "
                "at 1 and choose block_queries and block_images."
            )
        self.device_pairs = self.device_pairs.to(trainer.strategy.root_device)
        sizes = (self.block_queries, self.block_images, self.outside)
        return BlockLoader(BlockSampler(self.device_pairs, self.seed, *sizes), trainer)

    def val_dataloader(self) -> QueryLoader:
        """This process's part of the validation queries."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return QueryLoader(self.validation_pairs, rank, world_size)

    def training_features(self) -> Float[Tensor, "n d"]:
        """Features of all training images, where the blocks are drawn."""
        return self.device_pairs.images
