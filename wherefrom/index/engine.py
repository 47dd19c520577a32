"""Wrapper of a FAISS index: train, add, remove, merge and search, with the catalog's keys as ids."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from wherefrom.runtime.artifacts import StorageError, replacing
from wherefrom.runtime.optional_dependencies import require_faiss

Vectors = Float[NDArray[np.float32], "n e"]
Keys = Int64[NDArray[np.int64], " n"]
_faiss = cache(require_faiss)  # cached: it scans all installed distributions
_GPU_MOST = 2048  # most neighbours that FAISS returns per search on a GPU


class Engine:
    """FAISS index with inner product as metric.

    Inverted files store keys themselves; every other type is wrapped in an `IndexIDMap`.

    Args:
        index: The FAISS index, keys included.
    """

    def __init__(self, index: Any) -> None:
        faiss = _faiss()
        self._owner = index  # what `downcast_index` returns is a view, which does not keep it alive
        self.index: Any = faiss.downcast_index(index)
        self.gpu: Any = None
        self.mapped = isinstance(self.index, faiss.IndexIDMap)
        self.outer = faiss.downcast_index(self.index.index) if self.mapped else self.index
        self.inner = _innermost(self.outer)
        self.ivf = self.inner if isinstance(self.inner, faiss.IndexIVF) else None
        self._keys: Keys | None = None

    @classmethod
    def make(cls, factory: str, dimension: int) -> Engine:
        """Creates an empty, untrained index.

        Raises:
            ValueError: FAISS rejects the factory string for this dimension.
        """
        faiss = _faiss()
        try:
            owner = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(
                f"FAISS cannot create an index {factory!r} of {dimension} dimensions ({_reason(error)}). Give a "
                "factory string such as 'Flat', 'IVF4096,PQ64' or 'HNSW32'."
            ) from error
        index = faiss.downcast_index(owner)
        if isinstance(index, faiss.IndexIDMap):
            raise ValueError(f"The factory string {factory!r} maps ids, which the index does itself: leave IDMap out.")
        own_keys = isinstance(_innermost(index), faiss.IndexIVF) and not isinstance(index, faiss.IndexRefine)
        return cls(owner if own_keys else faiss.IndexIDMap(owner))

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return int(self.index.d)

    @property
    def is_exact(self) -> bool:
        """Whether it stores uncompressed vectors and searches exhaustively."""
        return type(self.outer) in (_faiss().IndexFlat, _faiss().IndexFlatIP)

    @property
    def can_remove(self) -> bool:
        """Whether vectors can be removed."""
        # An id map shifts on removal, and so must the index below it, which only flat codes do.
        faiss = _faiss()
        return not self.mapped or isinstance(_below_transform(self.outer), faiss.IndexFlatCodes)

    @property
    def can_merge(self) -> bool:
        """Whether FAISS can merge another index of the same training into it."""
        return self.can_remove

    def train(self, sample: Vectors) -> None:
        """Trains the index (such as its centroids and codebooks), before vectors are added.

        Raises:
            ValueError: There are too few vectors.
        """
        try:
            self.index.train(sample)
        except RuntimeError as error:
            raise ValueError(
                f"The index cannot be trained on {len(sample)} vectors ({_reason(error)}). Choose a factory string "
                "with fewer lists or codes, 'Flat' for a small set, or a larger sample."
            ) from error

    def add(self, vectors: Vectors, keys: Keys) -> None:
        """Adds vectors under keys larger than the existing ones.

        The levels of a graph (HNSW) are drawn by the first key, so that a build that goes on from a file, which does
        not hold FAISS's generator, draws what a build in one go does.
        """
        self._keys = None
        if hasattr(self.inner, "hnsw") and len(keys):
            self.inner.hnsw.rng = _faiss().RandomGenerator(int(keys[0]) % 2**31)
        self.index.add_with_ids(vectors, keys)

    def remove(self, keys: Keys) -> None:
        """Removes vectors; no effect for types that cannot."""
        if self.can_remove and len(keys):
            self._keys = None
            self.index.remove_ids(np.ascontiguousarray(keys, dtype=np.int64))

    def merge(self, other: Engine, shift: int) -> None:
        """Moves all vectors of another index into this one, adding `shift` to their keys; the other becomes empty.

        Raises:
            ValueError: The two are incompatible.
        """
        self._keys = None
        try:
            self.index.merge_from(other.index, shift)
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot merge the two indexes: {_reason(error)}.") from error

    def vectors(self, keys: Keys) -> Vectors:
        """Reconstructs the stored vectors of some keys; for types with an id map.

        Raises:
            ValueError: The type cannot reconstruct them.
        """
        assert self.mapped, "inverted files are merged by FAISS"
        if self._keys is None:
            self._keys = _faiss().vector_to_array(self.index.id_map)
        places = np.searchsorted(self._keys, keys)
        try:
            stored: Vectors = self.outer.reconstruct_batch(places)
        except RuntimeError as error:
            raise ValueError(
                f"Indexes of this type cannot be merged ({_reason(error)}): build one of all images."
            ) from error
        return stored

    def configure(self, settings: str) -> None:
        """Applies search settings, such as `nprobe=64` or `efSearch=128,k_factor_rf=4`.

        Raises:
            ValueError: The type has no such setting.
        """
        if settings:
            try:
                _faiss().ParameterSpace().set_index_parameters(self.index, settings)
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"The search settings {settings!r} do not fit the index ({_reason(error)}); inverted files have "
                    "'nprobe', HNSW 'efSearch', refined ones 'k_factor_rf', joined by commas."
                ) from error

    def to_gpu(self) -> None:
        """Moves searches to the first GPU.

        Raises:
            ValueError: FAISS finds no GPU.
        """
        faiss = _faiss()
        if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
            raise ValueError(
                "FAISS finds no GPU here: install its GPU distribution in place of the other (pip uninstall faiss-cpu, "
                "then pip install 'wherefrom[gpu]'), or search on the CPU."
            )
        self._resources = faiss.StandardGpuResources()
        self.gpu = faiss.index_cpu_to_gpu(self._resources, 0, self.index)

    def search(
        self, queries: Vectors, count: int, effort: int = 1
    ) -> tuple[Float[NDArray[np.float32], "q k"], Int64[NDArray[np.int64], "q k"]]:
        """Finds scores and keys of the nearest vectors, padded with -1.

        Args:
            queries: The queries.
            count: Number of neighbours, at most all vectors.
            effort: Factor on the search settings (`nprobe`).
        """
        if self.gpu is not None and effort == 1 and count <= _GPU_MOST:
            return _search(self.gpu, queries, count)
        faiss = _faiss()
        if self.ivf is not None and effort > 1:
            kept, self.ivf.nprobe = self.ivf.nprobe, min(self.ivf.nprobe * effort, self.ivf.nlist)
            try:
                return _search(self.index, queries, count)
            finally:
                self.ivf.nprobe = kept
        if effort > 1 and hasattr(self.inner, "storage"):
            scores, places = self._search_all(queries, count)
            return scores, faiss.vector_to_array(self.index.id_map)[places]
        return _search(self.index, queries, count)

    def _search_all(self, queries: Vectors, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Searches exhaustively in the storage of a graph, which may not reach every vector."""
        faiss = _faiss()
        if isinstance(self.outer, faiss.IndexRefine):
            return _search(faiss.downcast_index(self.outer.refine_index), queries, count)
        if isinstance(self.outer, faiss.IndexPreTransform):
            queries = _transformed(self.outer, queries)
        return _search(faiss.downcast_index(self.inner.storage), queries, count)

    def most_effort(self) -> int:
        """The effort at which the search is exhaustive."""
        return 2 if self.ivf is None else -(-self.ivf.nlist // self.ivf.nprobe)

    def trained_hash(self) -> str:
        """Computes the hash of an empty, trained index: two indexes can be merged if it is equal."""
        assert len(self) == 0
        return hashlib.blake2b(_faiss().serialize_index(self.index).tobytes(), digest_size=16).hexdigest()

    def copy(self) -> Engine:
        """Returns a copy of the index."""
        return Engine(_faiss().clone_index(self.index))

    def write(self, path: Path) -> None:
        """Writes the index to a file.

        Raises:
            StorageError: The file could not be written.
        """
        faiss = _faiss()
        # Through Python's file: FAISS's own writer does not notice that a full disk took only a part.
        with replacing(path) as temporary, temporary.open("wb") as stream:
            try:
                faiss.write_index(self.index, faiss.PyCallbackIOWriter(stream.write))
            except RuntimeError as error:
                raise StorageError(f"Cannot write {path}: {_reason(error)}. Free some space and try again.") from error

    @classmethod
    def read(cls, path: Path, mmap: bool = False) -> Engine:
        """Reads the index from a file.

        Args:
            path: The file.
            mmap: Memory-map the vectors where possible; the index is then read-only.

        Raises:
            ValueError: The file holds no FAISS index.
        """
        faiss = _faiss()
        try:
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mmap else 0))
        except (RuntimeError, MemoryError) as error:
            raise ValueError(f"{path} is not a FAISS index that can be read ({_reason(error)}).") from error


def _search(index: Any, queries: Vectors, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    nearest: tuple[NDArray[np.float32], NDArray[np.int64]] = index.search(queries, count)
    return nearest


def _transformed(index: Any, vectors: Vectors) -> Vectors:
    faiss = _faiss()
    for place in range(index.chain.size()):
        vectors = faiss.downcast_VectorTransform(index.chain.at(place)).apply(vectors)
    return vectors


def _below_transform(index: Any) -> Any:
    faiss = _faiss()
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def _innermost(index: Any) -> Any:
    """Returns the index that stores the vectors, below refinement and transforms."""
    faiss = _faiss()
    if isinstance(index, faiss.IndexRefine):
        index = faiss.downcast_index(index.base_index)
    return _below_transform(index)


def _reason(error: BaseException) -> str:
    """Extracts FAISS's message without its source location."""
    return str(error).strip().splitlines()[-1].split(": ", 1)[-1].strip() or type(error).__name__
