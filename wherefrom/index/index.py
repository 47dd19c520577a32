"""Index of a training set on disk: search, add, remove, restore and merge.

A folder holds these files, whose names carry a change counter so that every change is atomic:

- `index-N.faiss`: the vectors;
- `rows-N.parquet`: `key` (FAISS id, never reused), `image`, `captions` and further columns of each image;
- `removed-N.parquet`: ids of removed images, which are excluded from all later batches and shards;
- `manifest.json`: identity of ranker and training set, and which files are current.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from filelock import FileLock
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.index.catalog import IMAGE, KEY, keys_of
from wherefrom.index.contents import FILES, STATE, Contents
from wherefrom.index.embeddings import Embeddings, cosines, unit_vectors
from wherefrom.runtime.artifacts import canonical_json, read_manifest, write_manifest

Result = TypeVar("Result")
_MARGIN = 16  # extra neighbours per search, so that ties at the edge are usually included at once


@dataclass(frozen=True)
class SearchResult:
    """Nearest training images of one query.

    Attributes:
        images: Ids, the most influential first.
        scores: Cosine similarities; as precise as the index type stores vectors.
        rows: Catalog rows of the images: `image`, `captions` and further columns.
    """

    images: tuple[str, ...]
    scores: Float[NDArray[np.float64], " k"]
    rows: pa.Table


class Index:
    """Index of training images by embedding: the nearest to a query are its most influential ones.

    Args:
        folder: Folder of the index; see `build_index`.
        ranker: Identity of the ranker of the queries; None skips this check until a search.
        search: FAISS search settings, such as `nprobe=64`; None uses those it was built with.
        mmap: Memory-map the vectors instead of loading them.
        gpu: Search on the first GPU.
        verify: Verify the hashes of the files, which reads them once; else only their sizes.

    Raises:
        FileNotFoundError: The folder holds no index.
        ValueError: It is damaged, belongs to another ranker, or a setting is invalid.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ranker: Mapping[str, Any] | None = None,
        search: str | None = None,
        mmap: bool = True,
        gpu: bool = False,
        verify: bool = True,
    ) -> None:
        self.folder, self._search, self._mmap, self._gpu, self._verify = Path(folder), search, mmap, gpu, verify
        self.manifest = read_manifest(self.folder)
        if STATE not in self.manifest:
            raise ValueError(f"{folder} is an artifact of wherefrom, but not an index.")
        self._load()
        if ranker is not None:
            self._check_ranker(ranker, "The ranker")

    def _load(self) -> None:
        self.manifest = read_manifest(self.folder)
        self.contents = Contents.read(self.folder, self.manifest, self._mmap, self._verify)
        self.contents.engine.configure(self.contents.search if self._search is None else self._search)
        self._keys = keys_of(self.contents.rows)
        if self._gpu:
            self.contents.engine.to_gpu()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def removed(self) -> frozenset[str]:
        """Ids of removed images."""
        return frozenset(self.contents.removed)

    @property
    def rows(self) -> pa.Table:
        """Catalog of the images: `image`, `captions` and further columns."""
        return self.contents.rows.drop_columns([KEY])

    def _check_ranker(self, ranker: Mapping[str, Any], what: str) -> None:
        own = self.manifest["identity"]["ranker"]
        if canonical_json(ranker) != canonical_json(own):
            raise ValueError(
                f"{what} is another than the index's in {self.folder}: {dict(ranker)} there, {own} here. Cosines of "
                "two rankers' embeddings are not comparable: use the index's ranker, or build an index with this one."
            )

    def search(self, queries: Embeddings, k: int) -> list[SearchResult]:
        """Finds the k nearest images of each query, ties by id.

        Results do not depend on the other queries; for a `Flat` index they are bit-identical however it was built.

        Raises:
            ValueError: The queries belong to another ranker or are not unit vectors, or the index has fewer than k
                images.
        """
        self._check_ranker(queries.ranker, "The queries' ranker")
        if queries.vectors.shape[1] != self.contents.engine.dimension:
            raise ValueError(
                f"The queries have {queries.vectors.shape[1]} numbers, the index {self.contents.engine.dimension}."
            )
        if not 1 <= k <= len(self):
            raise ValueError(f"k must lie between 1 and the {len(self)} images of the index; given {k}.")
        vectors = unit_vectors(queries.vectors)
        engine, count = self.contents.engine, self._first_count(k)
        if engine.is_exact and len(vectors):
            # Batched, which is faster; scores are recomputed below, so no digit depends on the batch.
            firsts: list[Any] = list(zip(*engine.search(vectors, count), strict=True))
        else:
            firsts = [None] * len(vectors)
        return [self._find(vector, k, count, first) for vector, first in zip(vectors, firsts, strict=True)]

    def _first_count(self, k: int) -> int:
        total = len(self.contents.engine)
        deleted = total - len(self)
        return min(total, k + _MARGIN + min(deleted, k))

    def _find(self, query: NDArray[np.float32], k: int, count: int, first: Any) -> SearchResult:
        """Searches with increasing count and effort until k images are found, and all that may tie with the last."""
        engine, effort = self.contents.engine, 1
        total, most = len(engine), engine.most_effort()
        # Bound on the error of float32 inner products of unit vectors.
        slack = 2 * (engine.dimension + 2) * 2.0**-24 if engine.is_exact else 0.0
        while True:
            scores, keys = (
                engine.search(query[None], count, effort) if first is None else (first[0][None], first[1][None])
            )
            first, filled = None, bool((keys[0] >= 0).all())
            places = np.minimum(np.searchsorted(self._keys, keys[0]), len(self) - 1)
            alive = (keys[0] >= 0) & (self._keys[places] == keys[0])
            similarities, places = scores[0][alive].astype(np.float64), places[alive]
            order = np.argsort(-similarities, kind="stable")
            similarities, places = similarities[order], places[order]
            enough = len(similarities) >= k
            settled = enough and (not filled or count == total or similarities[-1] < similarities[k - 1] - slack)
            if settled:
                break
            if filled and count < total:
                count = min(2 * count, total)
            else:
                assert effort < most, "the search was exhaustive"
                effort = min(2 * effort, most)
        if engine.is_exact:
            similarities = cosines(engine.vectors(self._keys[places]), query)
        rows = self.contents.rows.take(places)
        images = np.asarray(rows[IMAGE].to_pylist())
        first_k = np.lexsort((images, -similarities))[:k]
        chosen = rows.take(first_k).drop_columns([KEY])
        return SearchResult(tuple(chosen[IMAGE].to_pylist()), similarities[first_k], chosen)

    def add(self, rows: pa.Table, embeddings: Embeddings, source: Any = None) -> tuple[str, ...]:
        """Adds images; see `rows_of`.

        Args:
            rows: Catalog of the images, one row each.
            embeddings: Their embeddings, in the same order.
            source: Identity of the data set they come from, recorded only.

        Returns:
            Ids that were skipped because they had been removed; `restore` them first to add them.

        Raises:
            ValueError: The embeddings belong to another ranker, an image is already in the index, or an embedding is
                not a unit vector.
            StorageError: The index could not be written; it is unchanged.
        """
        self._check_ranker(embeddings.ranker, "The embeddings' ranker")
        return self._change(lambda contents: contents.add(rows, embeddings.vectors, source))

    def remove(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Removes images, now and from all later batches and shards.

        Types that cannot delete a vector (HNSW, refined ones) keep it in their file, hidden and without its row, until
        they are rebuilt.

        Returns:
            Ids that the index did not hold: they are excluded from now on too, but may be misspelt.

        Raises:
            StorageError: The index could not be written; it is unchanged.
        """
        given = [ids] if isinstance(ids, str) else list(ids)
        return self._change(lambda contents: contents.remove(given))

    def restore(self, ids: Iterable[str]) -> None:
        """Allows removed images to be added again; they return with the next `add`.

        Raises:
            ValueError: An image was not removed.
            StorageError: The index could not be written; it is unchanged.
        """
        given = {ids} if isinstance(ids, str) else set(ids)

        def change(contents: Contents) -> None:
            unknown = sorted(given - contents.removed)
            if unknown:
                raise ValueError(f"{unknown[0]!r} was not removed from {self.folder}, so it cannot be restored.")
            contents.removed -= given

        self._change(change)

    def merge(self, *others: Path) -> None:
        """Adds all images of other indexes, which are unchanged.

        Raises:
            ValueError: An index has another ranker, type or training, or two hold the same image.
            StorageError: The index could not be written; it is unchanged.
        """

        def change(contents: Contents) -> None:
            for folder in others:
                manifest = read_manifest(folder)
                if STATE not in manifest:
                    raise ValueError(f"{folder} is an artifact of wherefrom, but not an index.")
                identity, own = manifest["identity"], self.manifest["identity"]
                self._check_ranker(identity["ranker"], f"The ranker of {folder}")
                if identity["factory"] != own["factory"]:
                    raise ValueError(
                        f"{folder} is an index {identity['factory']!r}, {self.folder} one {own['factory']!r}: only "
                        "indexes of one type can be merged."
                    )
                try:
                    contents.merge(Contents.read(folder, manifest))
                except ValueError as error:
                    raise ValueError(f"{folder} cannot be merged into {self.folder}: {error}") from error

        self._change(change)

    def _change(self, change: Callable[[Contents], Result]) -> Result:
        """Applies a change to the latest state and commits it by atomically replacing the manifest."""
        with FileLock(self.folder.with_name(self.folder.name + ".lock"), is_singleton=True):
            manifest = read_manifest(self.folder)
            contents = Contents.read(self.folder, manifest)
            returned = change(contents)
            state = contents.write(self.folder, manifest[STATE]["change"] + 1)
            write_manifest(self.folder, manifest["identity"], **{STATE: state})
            self._load()
            for kind in FILES:
                for path in self.folder.glob(f"{kind}-*"):
                    if path.name not in state["files"]:
                        path.unlink()
        return returned
