"""The index of a training set on disk: search, add, remove, restore and merge.

A folder holds, under names that count its changes up, so that a change is whole or has not happened:

- `index-N.faiss`: the vectors;
- `rows-N.parquet`: `key` (FAISS's id, never used twice), `image`, `captions` and further columns of each image;
- `removed-N.parquet`: ids of images that were taken down, which no batch and no shard brings back;
- `manifest.json`: whose embeddings of which training set they are, and which files count.
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
from wherefrom.index.embeddings import Embeddings, checked, cosines
from wherefrom.runtime.artifacts import canonical_json, read_manifest, write_manifest

Result = TypeVar("Result")
_MARGIN = 16  # found beyond what is asked for, so that ties at the edge are mostly seen at once


@dataclass(frozen=True)
class Hits:
    """What was found for one query.

    Attributes:
        images: Ids, the most influential first.
        scores: Cosines; as good as the index's type keeps vectors.
        rows: The images' rows: `image`, `captions` and further columns.
    """

    images: tuple[str, ...]
    scores: Float[NDArray[np.float64], " k"]
    rows: pa.Table


class Index:
    """Finds the training images whose embeddings are nearest to a query's: its most influential ones.

    Args:
        folder: Where it is; see `build_index`.
        ranker: Identity of the ranker whose queries it will get; None takes whatever it was built with.
        search: FAISS's search settings, such as `nprobe=64`; None takes those it was built with.
        mmap: Leave vectors on disk and read what a query needs.
        gpu: Search on the first GPU.
        verify: Compare the files with their hashes, which reads them once; else only with their sizes.

    Raises:
        FileNotFoundError: The folder holds no index.
        ValueError: It is damaged, another ranker's, or a setting does not fit.
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
        """Ids of images that were taken down."""
        return frozenset(self.contents.removed)

    @property
    def rows(self) -> pa.Table:
        """The images: `image`, `captions` and further columns."""
        return self.contents.rows.drop_columns([KEY])

    def _check_ranker(self, ranker: Mapping[str, Any], what: str) -> None:
        own = self.manifest["identity"]["ranker"]
        if canonical_json(ranker) != canonical_json(own):
            raise ValueError(
                f"{what} is another than the index's in {self.folder}: {dict(ranker)} there, {own} here. Cosines of "
                "two rankers' embeddings mean nothing: use the index's ranker, or build an index with this one."
            )

    def search(self, queries: Embeddings, k: int) -> list[Hits]:
        """The k nearest images of each query, ties by id.

        Each query's answer is the same in any company; of a `Flat` index also to the last digit, however it was made.

        Raises:
            ValueError: The queries are another ranker's or not unit vectors, or the index has not k images.
        """
        self._check_ranker(queries.ranker, "The queries' ranker")
        if queries.vectors.shape[1] != self.contents.engine.dimension:
            raise ValueError(
                f"The queries have {queries.vectors.shape[1]} numbers, the index {self.contents.engine.dimension}."
            )
        if not 1 <= k <= len(self):
            raise ValueError(f"k must lie between 1 and the {len(self)} images of the index; given {k}.")
        vectors = checked(queries.vectors)
        engine, count = self.contents.engine, self._first_count(k)
        if engine.is_exact and len(vectors):
            # Together, which is faster; the scores are measured again, so that no digit depends on it.
            firsts: list[Any] = list(zip(*engine.search(vectors, count), strict=True))
        else:
            firsts = [None] * len(vectors)
        return [self._find(vector, k, count, first) for vector, first in zip(vectors, firsts, strict=True)]

    def _first_count(self, k: int) -> int:
        total = len(self.contents.engine)
        dead = total - len(self)
        return min(total, k + _MARGIN + min(dead, k))

    def _find(self, query: NDArray[np.float32], k: int, count: int, first: Any) -> Hits:
        """Looks for more and looks harder until k images are found, and all that may tie with the last of them."""
        engine, effort = self.contents.engine, 1
        total, most = len(engine), engine.most_effort()
        # The float32 inner products of two unit vectors are off by less than this.
        slack = 2 * (engine.dimension + 2) * 2.0**-24 if engine.is_exact else 0.0
        while True:
            scores, keys = (
                engine.search(query[None], count, effort) if first is None else (first[0][None], first[1][None])
            )
            first, filled = None, bool((keys[0] >= 0).all())
            places = np.minimum(np.searchsorted(self._keys, keys[0]), len(self) - 1)
            alive = (keys[0] >= 0) & (self._keys[places] == keys[0])
            result, places = scores[0][alive].astype(np.float64), places[alive]
            order = np.argsort(-result, kind="stable")
            result, places = result[order], places[order]
            settled = len(result) >= k and (not filled or count == total or result[-1] < result[k - 1] - slack)
            if settled:
                break
            if filled and count < total:
                count = min(2 * count, total)
            else:
                assert effort < most, "every vector was looked at"
                effort = min(2 * effort, most)
        if engine.is_exact:
            result = cosines(engine.vectors(self._keys[places]), query)
        rows = self.contents.rows.take(places)
        images = np.asarray(rows[IMAGE].to_pylist())
        first_k = np.lexsort((images, -result))[:k]
        chosen = rows.take(first_k).drop_columns([KEY])
        return Hits(tuple(chosen[IMAGE].to_pylist()), result[first_k], chosen)

    def add(self, rows: pa.Table, embeddings: Embeddings, source: Any = None) -> tuple[str, ...]:
        """Adds images; see `rows_of`.

        Args:
            rows: One row an image.
            embeddings: Theirs, in the same order.
            source: Identity of what they come from, for the record.

        Returns:
            The ids that were left out because they had been taken down; `restore` them first to add them.

        Raises:
            ValueError: They are another ranker's, an image is there already, or an embedding is no unit vector.
            StorageError: It could not be written, and is as it was.
        """
        self._check_ranker(embeddings.ranker, "The embeddings' ranker")
        return self._change(lambda contents: contents.add(rows, embeddings.vectors, source))

    def remove(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Takes images down, at once and for all later batches and shards.

        Types that cannot give up a vector (HNSW, refined ones) keep it in their file, unseen and without its row, until
        they are built again.

        Returns:
            The ids that the index did not hold: they are kept out from now on too, but may be misspelt.

        Raises:
            StorageError: It could not be written, and is as it was.
        """
        given = [ids] if isinstance(ids, str) else list(ids)
        return self._change(lambda contents: contents.remove(given))

    def restore(self, ids: Iterable[str]) -> None:
        """Lets images that were taken down be added again; they come back when they are.

        Raises:
            ValueError: One was not taken down.
            StorageError: It could not be written, and is as it was.
        """
        given = {ids} if isinstance(ids, str) else set(ids)

        def change(contents: Contents) -> None:
            strangers = sorted(given - contents.removed)
            if strangers:
                raise ValueError(f"{strangers[0]!r} was not taken down from {self.folder}, so it cannot be restored.")
            contents.removed -= given

        self._change(change)

    def merge(self, *others: Path) -> None:
        """Adds all images of other indexes, which stay as they are.

        Raises:
            ValueError: One is another ranker's, another type's or trained apart, or two hold the same image.
            StorageError: It could not be written, and is as it was.
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
        """Changes the newest state and makes it count by one replaced file, the manifest."""
        with FileLock(self.folder.with_name(self.folder.name + ".lock"), is_singleton=True):
            manifest = read_manifest(self.folder)
            contents = Contents.read(self.folder, manifest)
            result = change(contents)
            state = contents.write(self.folder, manifest[STATE]["change"] + 1)
            write_manifest(self.folder, manifest["identity"], **{STATE: state})
            self._load()
            for kind in FILES:
                for path in self.folder.glob(f"{kind}-*"):
                    if path.name not in state["files"]:
                        path.unlink()
        return result
