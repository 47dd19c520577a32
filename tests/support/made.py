"""Vectors, rows and indexes for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from wherefrom.index import Embeddings, Index, SearchResult, build_index, catalog_rows
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.distributed import Runner

RANKER = {"sizes": {"outputs": 16}, "weights": "abc", "features": ["pixels"]}
WIDTH = 16


def unit(count: int, seed: int = 0, width: int = WIDTH) -> NDArray[np.float32]:
    """Random unit vectors."""
    vectors = np.random.default_rng(seed).standard_normal((count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def names(count: int, first: int = 0) -> list[str]:
    """Ids whose order is not that of their positions."""
    return [f"{(index * 7919) % 100_003:06d}" for index in range(first, first + count)]


def table(ids: Sequence[str]) -> pa.Table:
    """Rows of images with these ids."""
    columns = {"license": [f"licence {name}" for name in ids], "group": ["one"] * len(ids)}
    return catalog_rows(ids, [[f"caption of {name}"] for name in ids], columns)


def embeddings(vectors: NDArray[np.floating[Any]]) -> Embeddings:
    """The vectors as those of the tests' ranker."""
    return Embeddings(vectors, RANKER)


def built(root: Path, ids: Sequence[str], vectors: NDArray[np.float32], factory: str = "Flat", **further: Any) -> Path:
    """The folder of an index."""
    training = {"pictures": f"{len(ids)} from {ids[0]}"}
    return build_index(
        Store(root),
        runner=Runner(torch.device("cpu")),
        rows=table(ids),
        embeddings=embeddings(vectors),
        training=training,
        factory=factory,
        **further,
    )


def brute_force(
    ids: Sequence[str], vectors: NDArray[np.float32], query: NDArray[np.float32], k: int
) -> tuple[list[str], NDArray[np.float64]]:
    """The k best by cosine in float64, ties by id."""
    exact = np.array([float(np.dot(vector.astype(np.float64), query.astype(np.float64))) for vector in vectors])
    order = sorted(range(len(ids)), key=lambda place: (-exact[place], ids[place]))[:k]
    return [ids[place] for place in order], exact[order]


def same(first: Sequence[SearchResult], second: Sequence[SearchResult]) -> bool:
    """Whether all hits are equal to the last digit."""
    pairs = zip(first, second, strict=True)
    return all(a.images == b.images and np.array_equal(a.scores, b.scores) and a.rows.equals(b.rows) for a, b in pairs)


def opened(folder: Path, **further: Any) -> Index:
    """The index, for the tests' ranker."""
    return Index(folder, ranker=RANKER, **further)
