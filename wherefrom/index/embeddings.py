"""Embeddings of a ranker: unit vectors whose inner product is a cosine (Fast Data Attribution, section 4.3).

A training set is embedded once, in parts of fixed size, so that an interrupted run can be resumed and the number of
processes does not change the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.distillation.ranker import Ranker
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.checked_files import read_array
from wherefrom.runtime.console import Progress
from wherefrom.runtime.dataset_pass import build_across_processes
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.mapped_arrays import write_array

KIND, EMBEDDINGS = "embeddings", "embeddings.npy"
_CHUNK = (
    4096  # rows per resumable part: fixed, so that a run with another number of processes resumes from the same parts
)
_BLOCK = 4096  # rows compared at a time
_LENGTH_TOLERANCE = 1e-2  # a float16 copy of 768 numbers is within 1e-3 of unit length


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors with the identity of their ranker.

    Attributes:
        vectors: One row per image or query; may be memory-mapped.
        ranker: Identity of the ranker that computed them; see `ranker_identity`.

    Raises:
        ValueError: The vectors are not a matrix of floats.
    """

    vectors: Float[NDArray[np.floating[Any]], "n e"]
    ranker: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or not np.issubdtype(self.vectors.dtype, np.floating):
            raise ValueError(
                f"Embeddings must be a matrix of floats, one row per image; given {self.vectors.dtype} of shape "
                f"{self.vectors.shape}."
            )

    def __len__(self) -> int:
        return len(self.vectors)


def ranker_identity(ranker: Ranker, features: Sequence[str]) -> dict[str, Any]:
    """Identity of a ranker's embeddings: the ranker, and the names of its features.

    Args:
        ranker: The ranker.
        features: Names of the encoders whose features it takes, in order.

    Raises:
        ValueError: Its scale is not negative, so that a search by cosine would find the least influential images.
    """
    scale = float(ranker.scale.detach())
    if not scale < 0:  # not (a >= b): NaN is refused too
        raise ValueError(
            f"The ranker's scale is {scale:g}, but a search by cosine needs a negative one, which makes similar mean "
            "influential. It was not trained, or not long enough: train it again."
        )
    return {**ranker.identity(), "features": list(features)}


def unit_vectors(vectors: Float[NDArray[np.floating[Any]], "n e"], first: int = 0) -> Float[NDArray[np.float32], "n e"]:
    """Validates vectors and converts them to float32: each must be finite and of unit length, or zero.

    Args:
        vectors: The vectors.
        first: Index of the first row, for messages.

    Raises:
        ValueError: A row is not; names the first.
    """
    single = np.ascontiguousarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(single, axis=1)
    bad = np.flatnonzero(~((np.abs(lengths - 1) <= _LENGTH_TOLERANCE) | (lengths == 0)))  # NaN is among them
    if len(bad):
        raise ValueError(
            f"Embedding {first + int(bad[0])} has length {lengths[bad[0]]:g}; embeddings must be finite unit vectors. "
            "Look for images whose features are not finite, or divide the vectors by their lengths."
        )
    return single


def embed(
    ranker: Ranker, features: Float[Tensor, "n d"], names: Sequence[str], alone: bool = True
) -> Float[NDArray[np.float32], "n e"]:
    """Embeds features without dropout.

    Args:
        ranker: The ranker.
        features: Concatenated features of all encoders.
        names: Names of the encoders, for messages.
        alone: Embed each row separately, so that its last digits do not depend on the batch: for queries.

    Raises:
        ValueError: The features have another width, or an embedding is not finite.
    """
    if features.shape[1] != ranker.inputs:
        raise ValueError(
            f"The ranker takes {ranker.inputs} features, but {' and '.join(names)} give {features.shape[1]}: the "
            "encoders are not those that it was trained with."
        )
    embedded = ranker.embed_all(features, 1 if alone else max(len(features), 1))
    vectors: NDArray[np.float32] = embedded.float().cpu().numpy()
    return vectors


def embed_training_set(
    ranker: Ranker,
    *,
    names: Sequence[str],
    features: Sequence[Float[Tensor, "n d"]],
    training: Mapping[str, Any],
    store: Store,
    runner: Runner,
    progress: Progress | None = None,
) -> Embeddings:
    """Embeds a training set, or loads its embeddings from the store; every process gets all of them.

    Args:
        ranker: The ranker.
        names: Names of the encoders.
        features: Features of each encoder, which may be memory-mapped.
        training: Identity of the training set and of its features.
        store: Shared by all processes.
        runner: Device and rank of this process.
        progress: Called with (done, total) images.

    Raises:
        ValueError: The ranker cannot be served, the features do not fit it or one another, or one is not finite.
        StorageError: A file could not be written; finished parts are kept.
    """
    identity = {"ranker": ranker_identity(ranker, names), "training": dict(training)}
    counts = {len(part) for part in features}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"The encoders have features of {sorted(counts)} images: all must have equally many, at least 1."
        )
    (count,) = counts
    starts, partial = range(0, count, _CHUNK), store.partial(KIND, identity)

    def part(start: int) -> Path:
        return partial / f"part-{start:010d}.npy"

    def work() -> None:
        mine = [] if (partial / EMBEDDINGS).exists() else starts[runner.rank :: runner.world_size]
        for start in mine:
            if not part(start).exists():
                side_by_side = torch.cat([each[start : start + _CHUNK].float() for each in features], dim=1)
                vectors = unit_vectors(embed(ranker, side_by_side, names, alone=False), start)
                write_array(part(start), vectors.shape, [vectors])
            if progress is not None:
                progress(min(start + _CHUNK, count), count)

    def build(folder: Path) -> None:
        if not (folder / EMBEDDINGS).exists():
            blocks = (read_array(part(start)) for start in starts)
            write_array(folder / EMBEDDINGS, (count, int(ranker.sizes["outputs"])), blocks)
        for path in folder.glob("part-*.npy"):
            path.unlink()

    build_across_processes(
        work, finish=lambda: store.make(KIND, identity, build), store=store, kind=KIND, identity=identity, runner=runner
    )
    vectors = read_array(store.path(KIND, identity) / EMBEDDINGS, "r")
    return Embeddings(vectors, identity["ranker"])


def cosines(
    vectors: Float[NDArray[np.floating[Any]], "n e"], query: Float[NDArray[np.floating[Any]], " e"]
) -> Float[NDArray[np.float64], " n"]:
    """Computes inner products in float64, row by row: independent of order and number of rows, to the last digit."""
    products = np.empty(len(vectors), dtype=np.float64)
    wide = query.astype(np.float64)
    for start in range(0, len(vectors), _BLOCK):
        block = np.asarray(vectors[start : start + _BLOCK], dtype=np.float64)
        # Not a matrix product: in BLAS the summation order depends on the position of the row.
        products[start : start + _BLOCK] = (block * wide).sum(axis=1)
    return products
