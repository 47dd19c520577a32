"""Building an index as a resumable pass: trained on a seeded sample, filled in fixed shards, merged in order."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from wherefrom.index.catalog import id_mask, validate_rows, with_keys
from wherefrom.index.contents import STATE, Contents, check_shapes
from wherefrom.index.embeddings import Embeddings, unit_vectors
from wherefrom.index.engine import Engine
from wherefrom.runtime.artifacts import Store, identity_hash, read_manifest
from wherefrom.runtime.console import Progress
from wherefrom.runtime.dataset_pass import build_across_processes
from wherefrom.runtime.distributed import Runner

KIND = "index"
_TRAINED, _GROWING = "trained.faiss", "growing.faiss"
_BLOCK = 16384  # vectors added at a time
_SAVE_EVERY_S = 600.0  # each save writes the whole index so far, which may be gigabytes
_SAMPLE = 262_144
_logger = logging.getLogger(__name__)


def index_identity(
    ranker: Mapping[str, Any],
    *,
    training: Mapping[str, Any],
    factory: str,
    dimension: int,
    seed: int = 0,
    sample: int = _SAMPLE,
    like: Path | None = None,
    removed: Iterable[str] = (),
) -> dict[str, Any]:
    """Identity of an index in the store; see `build_index`."""
    return {
        "ranker": dict(ranker),
        "training": dict(training),
        "factory": factory,
        "seed": seed,
        "sample": sample,
        "dimension": dimension,
        "like": None if like is None else read_manifest(like)[STATE]["trained"],
        "removed": identity_hash({"ids": sorted(set(removed))}),
    }


def build_index(
    store: Store,
    *,
    runner: Runner,
    rows: pa.Table,
    embeddings: Embeddings,
    training: Mapping[str, Any],
    factory: str = "Flat",
    search: str = "",
    seed: int = 0,
    sample: int = _SAMPLE,
    shard: int = 262_144,
    like: Path | None = None,
    removed: Iterable[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Builds an index in the store, or finds it there; returns its folder for `Index`.

    Args:
        store: Shared by all processes.
        runner: Device and rank of this process.
        rows: Catalog of the images, one row each; see `rows_of`.
        embeddings: Their embeddings, in the same order.
        training: Identity of the training set.
        factory: FAISS factory string: `Flat`, `IVF4096,PQ64`, `HNSW32`, …
        search: Default FAISS search settings, such as `nprobe=64`.
        seed: Seed of the sample that the index is trained on.
        sample: Maximum number of vectors to train on.
        shard: Vectors per shard, for types that FAISS can merge; others are filled sequentially.
        like: An index whose training is reused, so that the two can be merged.
        removed: Ids that were removed earlier: they are excluded now and later.
        progress: Called with (done, total) vectors of this process.

    Raises:
        ValueError: The factory string, a setting, an embedding or a size is invalid.
        StorageError: A file could not be written; finished shards are kept.
    """
    validate_rows(rows)
    check_shapes(rows, embeddings.vectors, embeddings.vectors.shape[1])
    if sample < 1 or shard < 1:
        raise ValueError(f"sample and shard must be at least 1; given {sample} and {shard}.")
    dimension, excluded = int(embeddings.vectors.shape[1]), sorted(set(removed))
    Engine.make(factory, dimension).configure(search)  # fails before anything long
    if like is not None:
        _check_like(like, embeddings, factory)
    identity = index_identity(
        embeddings.ranker,
        training=training,
        factory=factory,
        dimension=dimension,
        seed=seed,
        sample=sample,
        like=like,
        removed=excluded,
    )
    chosen = np.flatnonzero(~id_mask(rows, excluded))
    if not len(chosen):
        raise ValueError("All images were removed, so there is nothing to index.")
    starts, partial = range(0, len(chosen), shard), store.partial(KIND, identity)

    def shard_file(start: int) -> Path:
        return partial / f"shard-{start:010d}-{shard}.faiss"

    def fill(engine: Engine, start: int, stop: int, total: int, save: Path | None = None) -> None:
        saved = time.monotonic()
        for first in range(start, stop, _BLOCK):
            keys = chosen[first : min(first + _BLOCK, stop)].astype(np.int64)
            engine.add(unit_vectors(embeddings.vectors[_span(keys)], int(keys[0])), keys)
            if progress is not None:
                progress(min(first + _BLOCK, stop), total)
            if save is not None and time.monotonic() - saved > _SAVE_EVERY_S:
                engine.write(save)
                saved = time.monotonic()

    def work() -> None:
        if runner.is_main:
            partial.mkdir(parents=True, exist_ok=True)
            if _whole(partial / _TRAINED) is None:
                _trained(embeddings, chosen=chosen, factory=factory, seed=seed, sample=sample, like=like).write(
                    partial / _TRAINED
                )
        runner.barrier()
        engine = Engine.read(partial / _TRAINED)
        if engine.can_merge:
            for start in starts[runner.rank :: runner.world_size]:
                if _whole(shard_file(start)) is None:
                    part = engine.copy()
                    fill(part, start, min(start + shard, len(chosen)), len(chosen))
                    part.write(shard_file(start))

    def finish() -> None:
        store.make(KIND, identity, build)

    def build(folder: Path) -> dict[str, Any]:
        engine = Engine.read(folder / _TRAINED)
        trained = engine.trained_hash()
        if engine.can_merge:
            for start in starts:
                engine.merge(Engine.read(shard_file(start)), 0)
        else:
            engine = _whole(folder / _GROWING) or engine
            fill(engine, len(engine), len(chosen), len(chosen), folder / _GROWING)
        assert len(engine) == len(chosen), "a shard is missing"
        kept = with_keys(rows.take(chosen), chosen.astype(np.int64))
        contents = Contents(
            engine,
            rows=kept,
            removed=excluded,
            next_key=len(rows),
            trained=trained,
            search=search,
            sources=[dict(training)],
        )
        state = contents.write(folder, 1)
        for path in (folder / _TRAINED, folder / _GROWING, *folder.glob("shard-*")):
            path.unlink(missing_ok=True)
        return {STATE: state}

    build_across_processes(work, finish=finish, store=store, kind=KIND, identity=identity, runner=runner)
    return store.path(KIND, identity)


def _whole(path: Path) -> Engine | None:
    """The index in a file of an interrupted run; None where there is none, or a damaged one, which is made again."""
    try:
        return Engine.read(path) if path.exists() else None
    except ValueError as error:
        _logger.warning("%s It is made again.", error)
        path.unlink()
        return None


def _span(keys: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Converts consecutive keys to a slice, which is read from disk in one piece."""
    first, last = int(keys[0]), int(keys[-1])
    return slice(first, last + 1) if last - first + 1 == len(keys) else keys


def _trained(
    embeddings: Embeddings, *, chosen: NDArray[np.intp], factory: str, seed: int, sample: int, like: Path | None
) -> Engine:
    if like is not None:
        contents = Contents.read(like, read_manifest(like))
        contents.engine.index.reset()
        return contents.engine
    engine = Engine.make(factory, embeddings.vectors.shape[1])
    drawn = np.random.default_rng(seed).choice(len(chosen), min(sample, len(chosen)), replace=False)
    engine.train(unit_vectors(embeddings.vectors[chosen[np.sort(drawn)]]))
    return engine


def _check_like(like: Path, embeddings: Embeddings, factory: str) -> None:
    identity = read_manifest(like)["identity"]
    if identity["factory"] != factory or identity["ranker"] != dict(embeddings.ranker):
        raise ValueError(
            f"{like} is an index {identity.get('factory')!r} of another type or ranker than {factory!r} here: its "
            "training cannot be reused."
        )
