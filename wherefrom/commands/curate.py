"""Curation command: builds a teacher set of generated queries, candidates and scores by an expensive method.

Fast Data Attribution, section 4. Queries are processed in blocks, each with its own run folder: an interrupted curation
resumes query by query, and blocks can be distributed to workers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from wherefrom.attributors.base import Attributor
from wherefrom.attributors.rerank import Rerank
from wherefrom.commands.attribute import attribute
from wherefrom.data.image_set import ImageSet
from wherefrom.distillation.teacher_set import (
    QUERIES,
    Features,
    TeacherSet,
    has_features,
    read_teacher_set,
    write_teacher_set,
)
from wherefrom.features.base import ImageEncoder, TextEncoder, query_features, training_features
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.sources import QuerySource, generate
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.runtime.artifacts import MANIFEST, Store, check_identity, identity_hash, write_manifest
from wherefrom.runtime.console import Log, Progress, duration, no_log
from wherefrom.runtime.distributed import Runner, best_device
from wherefrom.runtime.executors import Engine, in_process
from wherefrom.runtime.keyed_random import hash_text
from wherefrom.runtime.stable_names import settings_identity

Encoder = ImageEncoder | TextEncoder
BLOCKS = "blocks"


@dataclass(frozen=True)
class Captions:
    """Selection of captions as prompts of the queries.

    Attributes:
        count: Number of captions.
        skip: Number of captions to skip first, in the same order: a test set skips those of the training set.
        of: Captions of training images, or of held-out images.
        seed: Seed of the order, which is by hash.

    Raises:
        ValueError: `count` is not positive, `skip` negative, or `of` unknown.
    """

    count: int = 300
    skip: int = 0
    of: Literal["training", "held_out"] = "training"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.skip < 0:
            raise ValueError(f"captions.count must be positive, skip not negative; given {self.count} and {self.skip}.")
        if self.of not in ("training", "held_out"):
            raise ValueError(f"captions.of must be 'training' or 'held_out'; given {self.of!r}.")

    def choose(self, data: TrainingData) -> list[str]:
        """Selects distinct captions.

        Raises:
            ValueError: There are too few captions, or no held-out images.
        """
        images = data.images if self.of == "training" else data.held_out
        if images is None or len(images) == 0:
            raise ValueError("captions.of is 'held_out', but the data hold no held-out images.")
        distinct = {several[0] for several in images.captions}
        ordered = sorted(distinct, key=lambda caption: (hash_text(f"captions/{self.seed}/{caption}"), caption))
        chosen = ordered[self.skip : self.skip + self.count]
        if len(chosen) < self.count:
            raise ValueError(
                f"captions.skip {self.skip} and count {self.count} ask for more than the {len(ordered)} different "
                f"captions of the {self.of.replace('_', '-')} images."
            )
        return chosen


@dataclass(frozen=True)
class Block:
    """Queries that are processed together.

    Attributes:
        number: Number of the block.
        prompts: Prompts of the queries.
    """

    number: int
    prompts: tuple[str, ...]


class TeacherScorer:
    """Generates and scores the queries of a block; finished queries are loaded from the block's folder.

    Args:
        folder: Folder of the teacher set.
        method: The teacher.
        data: Training images.
        model: The model, which generates the queries.
        source: Sampler settings of the queries.
        shape: (C, H, W) of a latent.
        store: Store of the teacher's artifacts; shared by all workers.
        runner: Device and rank of this process; None in separate workers.
        progress: Called with (done, total) while the teacher is fitted.
    """

    def __init__(
        self,
        folder: Path,
        *,
        method: Attributor,
        data: TrainingData,
        model: DiffusionModel,
        source: QuerySource,
        shape: tuple[int, int, int],
        store: Store,
        runner: Runner | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.folder, self.method, self.data, self.model = folder, method, data, model
        self.source, self.shape, self.store, self.runner, self.progress = source, shape, store, runner, progress

    def queries(self, block: Block) -> list[Query]:
        """Generates the queries of a block."""
        model, source = self.model.to(self._place().device), self.source
        return generate(
            model,
            prompts=block.prompts,
            seed=source.seed,
            shape=self.shape,
            sampling_steps=source.sampling_steps,
            guidance=source.guidance,
            eta=source.eta,
        )

    def __call__(self, block: Block) -> list[Scores]:
        """Generates and scores the queries of a block."""
        queries, runner = self.queries(block), self._place()
        self.method.progress = self.progress
        place = self.folder / BLOCKS / f"{block.number:05d}"
        return attribute(
            place,
            attributor=self.method,
            data=self.data,
            model=self.model,
            queries=queries,
            store=self.store,
            runner=runner,
            options=None,
        )

    def _place(self) -> Runner:
        return Runner.current(best_device()) if self.runner is None else self.runner


def curate(
    folder: Path,
    *,
    teacher: Attributor,
    data: TrainingData,
    model: DiffusionModel,
    captions: Captions,
    source: QuerySource,
    shape: tuple[int, int, int],
    features: Mapping[str, Encoder],
    store: Store,
    nearest: Attributor | None = None,
    k: int | None = None,
    subsample: int | None = None,
    block_size: int = 16,
    engine: Engine[Block, list[Scores]] = in_process,
    runner: Runner | None = None,
    log: Log = no_log,
    progress: Progress | None = None,
) -> TeacherSet:
    """Builds a teacher set or resumes one; features missing from a finished set are recomputed.

    Args:
        folder: Output folder.
        teacher: Method that scores the candidates of each query.
        data: Training images, with latents where the teacher needs them.
        model: Model that generates the queries.
        captions: Selection of captions as prompts.
        source: Sampler settings of the queries; its prompts are not used.
        shape: (C, H, W) of a latent.
        features: Encoders by name; their features of images and queries are saved with the set.
        store: Store of the methods' artifacts.
        nearest: Method that selects the candidates among training images; None scores all images.
        k: Number of candidates per query.
        subsample: Number of candidates that are scored, sampled by hash; None scores all.
        block_size: Queries per block: the unit of work of a worker.
        engine: Executor that processes the blocks.
        runner: Device and rank of this process, if it processes blocks itself.
        log: Receives progress messages.
        progress: Called with (done, total) during long steps.

    Raises:
        ArtifactMismatchError: The folder holds a set with other settings.
        ValueError: Settings do not fit together, or blocks failed; finished queries are kept.
        StorageError: A file could not be written.
    """
    if (nearest is None) != (k is None) or (subsample is not None and k is None):
        raise ValueError("Give both nearest and k (and a subsample only with them), or none of them.")
    if block_size < 1:
        raise ValueError(f"block_size must be positive; given {block_size}.")
    method = teacher if nearest is None or k is None else Rerank(teacher, nearest, k, subsample=subsample)
    scored = len(data.images) if k is None else (subsample or min(k, len(data.images)))
    prompts = captions.choose(data)
    identity = {
        "teacher": method.identity(),
        "model": model.fingerprint(),
        "training": identity_hash({"of": data.images.weighted_fingerprint, "ids": list(data.images.ids)}),
        "captions": settings_identity(captions),
        "sampler": {
            "seed": source.seed,
            "steps": source.sampling_steps,
            "guidance": source.guidance,
            "eta": source.eta,
        },
        "scored": scored,
        "features": {name: encoder.identity() for name, encoder in features.items()},
        "block_size": block_size,
    }
    blocks = [
        Block(number, tuple(prompts[start : start + block_size]))
        for number, start in enumerate(range(0, len(prompts), block_size))
    ]
    if (folder / MANIFEST).exists():
        check_identity(folder, identity)
        if all(has_features(folder, name) for name in features):
            return read_teacher_set(folder)
        log(f"{folder} has its rankings but not its features: they are computed now")
        scorer = TeacherScorer(
            folder, method=method, data=data, model=model, source=source, shape=shape, store=store, runner=runner
        )
        generated = [query for block in blocks for query in scorer.queries(block)]
        teacher_set = read_teacher_set(folder, [])
        if tuple(query.name for query in generated) != teacher_set.queries:
            raise ValueError(f"The queries in {folder / QUERIES} are not those that these settings generate.")
        computed = {
            name: _features(generated, data.images, encoder, store, progress) for name, encoder in features.items()
        }
        teacher_set = replace(teacher_set, features=computed)
        if runner is None or runner.is_main:
            write_teacher_set(folder, teacher_set)
        return teacher_set
    blocks_folder = folder / BLOCKS
    if (blocks_folder / MANIFEST).exists():
        check_identity(blocks_folder, identity)
    elif runner is None or runner.is_main:
        write_manifest(blocks_folder, identity)
    log(f"{len(prompts)} queries in {len(blocks)} blocks, {scored:,} training images scored for each")
    alone = TrainingData(data.images, data.latents)  # a teacher set has no use for scores of held-out images
    scorer = TeacherScorer(
        folder,
        method=method,
        data=alone,
        model=model,
        source=source,
        shape=shape,
        store=store,
        runner=runner,
        progress=progress,
    )
    by_block = _process(engine, scorer, blocks, log)
    ordered = [scores for block in blocks for scores in by_block[block]]
    teacher_set = _teacher_set(
        ordered, images=data.images, scored=scored, features=features, store=store, identity=identity, progress=progress
    )
    if runner is None or runner.is_main:
        write_teacher_set(folder, teacher_set)
    log(f"teacher set: {folder}")
    return teacher_set


def _process(
    engine: Engine[Block, list[Scores]], scorer: TeacherScorer, blocks: Sequence[Block], log: Log
) -> dict[Block, list[Scores]]:
    by_block: dict[Block, list[Scores]] = {}
    failed: list[tuple[Block, Exception]] = []
    started = time.monotonic()
    for done, (block, result) in enumerate(engine(scorer, blocks), start=1):
        if isinstance(result, Exception):
            failed.append((block, result))
            log(f"FAILED: block {block.number}: {result}")
            continue
        by_block[block] = result
        left = (time.monotonic() - started) / done * (len(blocks) - done)
        log(f"block {done} of {len(blocks)} is done; {duration(left)} to go")
    if failed:
        block, error = failed[0]
        raise ValueError(
            f"{len(failed)} of {len(blocks)} blocks failed; the others are kept, and the same command resumes from "
            f"there. The first that failed, block {block.number}: {error}"
        ) from error
    return by_block


def _teacher_set(
    results: Sequence[Scores],
    *,
    images: ImageSet,
    scored: int,
    features: Mapping[str, Encoder],
    store: Store,
    identity: Mapping[str, Any],
    progress: Progress | None,
) -> TeacherSet:
    row_of = {name: row for row, name in enumerate(images.ids)}
    # Images that a reranking method did not score rank after all that it did. Scores of one copy: a ranker sees an
    # image's features, which do not say how often training saw it.
    tops = [replace(scores, scores=scores.comparable).top(scored) for scores in results]
    queries = [scores.query for scores in results]
    return TeacherSet(
        images.ids,
        tuple(several[0] for several in images.captions),
        tuple(scores.query.name for scores in results),
        tuple(scores.query.prompt for scores in results),
        np.array([[row_of[name] for name, _ in top] for top in tops], dtype=np.int32),
        np.array([[value for _, value in top] for top in tops], dtype=np.float32),
        {name: _features(queries, images, encoder, store, progress) for name, encoder in features.items()},
        identity,
    )


def _features(
    queries: Sequence[Query], images: ImageSet, encoder: Encoder, store: Store, progress: Progress | None
) -> Features:
    training = training_features(images, encoder, store, progress)
    pixels = np.stack([query.pixels for query in queries])
    drawn = query_features(pixels, [query.prompt for query in queries], encoder)
    return Features(np.asarray(training.to(torch.float32)), np.asarray(drawn.to(torch.float32)))
