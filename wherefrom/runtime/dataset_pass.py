"""Resumable passes over the training set: losses, curvature, gradients or embeddings, computed chunk by chunk.

The images are divided into chunks of fixed ranges. Each process takes every `world_size`-th unfinished chunk and saves
its state periodically, always between chunks; a resumed run loads the finished chunks. So neither batch size, nor the
number of processes, nor an interruption changes the result beyond the order of floating-point summation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from wherefrom.runtime.artifacts import Identity, Store, replacing, storage_errors
from wherefrom.runtime.checked_files import read_tensors
from wherefrom.runtime.console import Progress
from wherefrom.runtime.distributed import Runner

CHUNKS = "finished_chunks"
RESULT = "result.safetensors"
MERGED, RANK_FILES, STATE_FILES = "merged.state.safetensors", "rank*.state.safetensors", "*.state.safetensors"
_SAVE_EVERY_S = 20.0


class TrainingPass(Protocol):
    """Accumulator of a pass: its state can be merged with that of another process."""

    def step(self, positions: range) -> None:
        """Accumulates the images at these positions."""
        ...

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Merges the state of another process or of an earlier run."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The accumulated state."""
        ...


Pass = TypeVar("Pass", bound=TrainingPass)


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous().cpu() for name, tensor in state.items()}


def _write_state(path: Path, accumulator: TrainingPass, chunks: list[int]) -> None:
    with replacing(path) as temporary:
        save_file({**_contiguous(accumulator.state_dict()), CHUNKS: torch.tensor(chunks, dtype=torch.int64)}, temporary)


def _merge_files(accumulator: TrainingPass, folder: Path) -> list[int]:
    """Merges every state file into `accumulator`; returns the finished chunks."""
    finished: list[int] = []
    # `merged` first: a rank's file whose chunks it already holds was left behind by an interruption between writing
    # and deleting.
    for path in sorted(folder.glob(STATE_FILES), key=lambda path: (path.name != MERGED, path.stem)):
        state = read_tensors(path, [CHUNKS])
        chunks: list[int] = state.pop(CHUNKS).tolist()
        if not set(chunks) <= set(finished):
            accumulator.merge(state)
            finished += chunks
    return finished


def run_pass(
    make: Callable[[], Pass],
    *,
    count: int,
    store: Store,
    kind: str,
    identity: Identity,
    runner: Runner,
    chunk_size: int = 128,
    progress: Progress | None = None,
) -> Pass:
    """Runs a pass over `count` images, or loads its result from the store; every process gets the complete result.

    Args:
        make: Creates an empty pass.
        count: Number of images.
        store: Where the result and the checkpoints are kept; shared by all processes.
        kind: Kind of artifact.
        identity: What must match for the result to be reused.
        runner: Device and rank of this process.
        chunk_size: Images per chunk.
        progress: Called with (done, total) chunks of this process.

    Raises:
        StorageError: A file could not be written; finished chunks are kept.
    """
    build_across_processes(
        lambda: _run_chunks(
            make,
            count=count,
            folder=store.partial(kind, identity),
            runner=runner,
            chunk_size=chunk_size,
            progress=progress,
        ),
        finish=lambda: _finish(make(), count=count, store=store, kind=kind, identity=identity, chunk_size=chunk_size),
        store=store,
        kind=kind,
        identity=identity,
        runner=runner,
    )
    complete = make()
    complete.merge(read_tensors(store.path(kind, identity) / RESULT))
    return complete


def build_across_processes(
    work: Callable[[], None],
    *,
    finish: Callable[[], object],
    store: Store,
    kind: str,
    identity: Identity,
    runner: Runner,
) -> None:
    """Builds an artifact with all processes, unless the store already has it.

    Args:
        work: Computes this process's share into the store's partial folder.
        finish: Combines all shares into the artifact; called by the main process.
        store: Shared by all processes.
        kind: Kind of artifact.
        identity: Its identity.
        runner: Device and rank of this process.
    """
    existing = store.find(kind, identity)
    # Another run may be at the same pass in the same store: the main process waits for it and uses its result.
    with store.lock(kind, identity) if runner.is_main and existing is None else nullcontext():
        missing = runner.is_main and store.find(kind, identity) is None
        if runner.sum(torch.tensor(float(missing), device=runner.device)) > 0:
            work()
            runner.barrier()
            if runner.is_main:
                finish()
    runner.barrier()


def _finish(total: TrainingPass, *, count: int, store: Store, kind: str, identity: Identity, chunk_size: int) -> None:
    """Builds the artifact from the state files of all processes."""
    finished = _merge_files(total, store.partial(kind, identity))
    assert sorted(finished) == list(range(-(-count // chunk_size))), "a chunk is missing or was processed twice"

    def build(partial: Path) -> None:
        with replacing(partial / RESULT) as temporary:
            save_file(_contiguous(total.state_dict()), temporary)
        for path in partial.glob(STATE_FILES):
            path.unlink()

    store.make(kind, identity, build)


def _merge_earlier(earlier: TrainingPass, folder: Path) -> None:
    """Merges the state files of an interrupted run into one."""
    finished = _merge_files(earlier, folder)
    if finished:
        _write_state(folder / MERGED, earlier, finished)
        for path in folder.glob(RANK_FILES):
            path.unlink()


def _run_chunks(
    make: Callable[[], Pass], *, count: int, folder: Path, runner: Runner, chunk_size: int, progress: Progress | None
) -> None:
    ranges = [range(start, min(start + chunk_size, count)) for start in range(0, count, chunk_size)]
    merged = folder / MERGED
    if runner.is_main:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        _merge_earlier(make(), folder)
    runner.barrier()
    done = set(read_tensors(merged, [CHUNKS])[CHUNKS].tolist()) if merged.exists() else set()
    mine = [chunk for chunk in range(len(ranges)) if chunk not in done][runner.rank :: runner.world_size]
    accumulator, finished_here, saved = make(), [], time.monotonic()
    for index, chunk in enumerate(mine):
        accumulator.step(ranges[chunk])
        finished_here.append(chunk)
        if time.monotonic() - saved > _SAVE_EVERY_S or index + 1 == len(mine):
            _write_state(folder / f"rank{runner.rank:05d}.state.safetensors", accumulator, finished_here)
            saved = time.monotonic()
        if progress is not None:
            progress(index + 1, len(mine))
