"""Resumable cache of one row of numbers per image, computed in chunks and memory-mapped.

Unlike the state of a pass (`wherefrom.runtime.dataset_pass`), the rows are never in memory together: each finished
chunk is a file, and the chunks are joined on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from wherefrom.runtime.artifacts import ArtifactMismatchError, Identity, Store, storage_errors, write_json
from wherefrom.runtime.checked_files import read_list
from wherefrom.runtime.console import Progress
from wherefrom.runtime.dataset_pass import build_across_processes
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.mapped_arrays import map_array, write_array

VALUES, IDS, CHUNK_FILES = "rows.npy", "ids.json", "chunk-*.npy"


@dataclass(frozen=True)
class Rows:
    """Rows of numbers, one per image.

    Attributes:
        ids: The images' ids.
        values: One row per image, in the order of the ids; memory-mapped.
    """

    ids: tuple[str, ...]
    values: Float[Tensor, "n ..."]


def read_rows(folder: Path) -> Rows:
    """Loads the rows of an artifact.

    Raises:
        FileNotFoundError: The folder holds no rows.
    """
    return Rows(tuple(read_list(folder / IDS)), map_array(folder / VALUES))


def _chunk_file(folder: Path, chunk: range) -> Path:
    return folder / f"chunk-{chunk.start:09d}-{chunk.stop:09d}.npy"


def make_rows(
    compute: Callable[[range], Float[Tensor, "b ..."]],
    *,
    ids: Sequence[str],
    store: Store,
    kind: str,
    identity: Identity,
    runner: Runner,
    chunk_size: int = 128,
    progress: Progress | None = None,
) -> Rows:
    """Computes a row for each image, or loads the rows from the store.

    Args:
        compute: Returns the rows of the images at some positions, in float32 or float64.
        ids: Ids of all images.
        store: Where the rows are kept, and finished chunks until then; shared by all processes.
        kind: Kind of artifact.
        identity: What must match for the rows to be reused.
        runner: Device and rank of this process.
        chunk_size: Images per chunk: the most that an interruption loses.
        progress: Called with (done, total) chunks of this process.

    Raises:
        ArtifactMismatchError: The rows in the store belong to other images.
        StorageError: A file could not be written; finished chunks are kept.
    """
    chunks = [range(start, min(start + chunk_size, len(ids))) for start in range(0, len(ids), chunk_size)]
    folder = store.partial(kind, identity)

    def work() -> None:
        if runner.is_main:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
        runner.barrier()
        joined = (folder / VALUES).exists()  # by a run that was interrupted after that
        missing = [] if joined else [chunk for chunk in chunks if not _chunk_file(folder, chunk).exists()]
        runner.barrier()  # every process must list the missing files before the first one appears
        mine = missing[runner.rank :: runner.world_size]
        for index, chunk in enumerate(mine):
            rows = compute(chunk).cpu().numpy()
            write_array(_chunk_file(folder, chunk), rows.shape, [rows], rows.dtype)
            if progress is not None:
                progress(index + 1, len(mine))

    def finish() -> None:
        def build(partial: Path) -> None:
            if not (partial / VALUES).exists():
                parts = [map_array(_chunk_file(partial, chunk)).numpy() for chunk in chunks]
                write_array(partial / VALUES, (len(ids), *parts[0].shape[1:]), parts, parts[0].dtype)
            write_json(partial / IDS, list(ids))
            for path in partial.glob(CHUNK_FILES):
                path.unlink()

        store.make(kind, identity, build)

    build_across_processes(work, finish=finish, store=store, kind=kind, identity=identity, runner=runner)
    rows = read_rows(store.path(kind, identity))
    if rows.ids != tuple(ids):
        raise ArtifactMismatchError(
            f"{store.path(kind, identity)} holds rows of {len(rows.ids)} other images than the {len(ids)} asked for. "
            "Delete the folder and run the same command again."
        )
    return rows
