"""A FAISS index whose ids are the keys of our rows, with what its type can do: train, add, remove, merge, search."""

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
_faiss = cache(require_faiss)  # it looks through all installed distributions
_GPU_MOST = 2048  # FAISS finds no more at once on a GPU


class Engine:
    """A FAISS index under inner product.

    Inverted files keep keys themselves; every other type gets them from an `IndexIDMap` around it.

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
        """An empty, untrained index.

        Raises:
            ValueError: FAISS does not know the factory string, or it does not fit the dimension.
        """
        faiss = _faiss()
        try:
            owner = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(
                f"FAISS makes no index {factory!r} of {dimension} dimensions ({_reason(error)}). Give a factory string "
                "such as 'Flat', 'IVF4096,PQ64' or 'HNSW32'."
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
        """Whether it holds the vectors as they are and compares with all of them."""
        return type(self.outer) in (_faiss().IndexFlat, _faiss().IndexFlatIP)

    @property
    def can_remove(self) -> bool:
        """Whether a vector can be taken out of it."""
        # A map of ids shifts when the index below does, which types other than flat codes do not.
        faiss = _faiss()
        return not self.mapped or isinstance(_below_transform(self.outer), faiss.IndexFlatCodes)

    @property
    def can_merge(self) -> bool:
        """Whether FAISS can put another index of the same training into it."""
        return self.can_remove

    def train(self, sample: Vectors) -> None:
        """Learns what the type must know before vectors are added.

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
        """Adds vectors under keys that are larger than those it has."""
        self._keys = None
        self.index.add_with_ids(vectors, keys)

    def remove(self, keys: Keys) -> None:
        """Takes vectors out, where the type can; else it does nothing."""
        if self.can_remove and len(keys):
            self._keys = None
            self.index.remove_ids(np.ascontiguousarray(keys, dtype=np.int64))

    def merge(self, other: Engine, shift: int) -> None:
        """Moves all vectors of another index into it, their keys raised by `shift`; the other is empty then.

        Raises:
            ValueError: The two are not alike.
        """
        self._keys = None
        try:
            self.index.merge_from(other.index, shift)
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot merge the two indexes: {_reason(error)}.") from error

    def vectors(self, keys: Keys) -> Vectors:
        """The vectors of some keys as it holds them; for types whose keys are mapped.

        Raises:
            ValueError: The type cannot give them back.
        """
        assert self.mapped, "inverted files are merged by FAISS"
        if self._keys is None:
            self._keys = _faiss().vector_to_array(self.index.id_map)
        places = np.searchsorted(self._keys, keys)
        try:
            result: Vectors = self.outer.reconstruct_batch(places)
        except RuntimeError as error:
            raise ValueError(f"Indexes of this type cannot be merged ({_reason(error)}): make one of all.") from error
        return result

    def configure(self, settings: str) -> None:
        """Sets how thoroughly it searches, such as `nprobe=64` or `efSearch=128,k_factor_rf=4`.

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
        """Searches on the first GPU from now on.

        Raises:
            ValueError: FAISS has no GPU.
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
        """Scores and keys of the nearest vectors, -1 where fewer were found.

        Args:
            queries: The queries.
            count: How many to find, at most all.
            effort: How many times as much is looked at as the settings say.
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
        """Looks at every vector: a graph may not reach them all, but its storage does."""
        faiss = _faiss()
        if isinstance(self.outer, faiss.IndexRefine):
            return _search(faiss.downcast_index(self.outer.refine_index), queries, count)
        if isinstance(self.outer, faiss.IndexPreTransform):
            queries = _transformed(self.outer, queries)
        return _search(faiss.downcast_index(self.inner.storage), queries, count)

    def most_effort(self) -> int:
        """The effort at which every vector is looked at."""
        return 2 if self.ivf is None else -(-self.ivf.nlist // self.ivf.nprobe)

    def trained_hash(self) -> str:
        """Of an empty index: what two must share to be merged."""
        assert len(self) == 0
        return hashlib.blake2b(_faiss().serialize_index(self.index).tobytes(), digest_size=16).hexdigest()

    def copy(self) -> Engine:
        """Another index of the same content."""
        return Engine(_faiss().clone_index(self.index))

    def write(self, path: Path) -> None:
        """Writes it.

        Raises:
            StorageError: The file could not be written.
        """
        with replacing(path) as temporary:
            try:
                _faiss().write_index(self.index, str(temporary))
            except RuntimeError as error:
                raise StorageError(f"Cannot write {path}: {_reason(error)}. Free some space and try again.") from error

    @classmethod
    def read(cls, path: Path, mmap: bool = False) -> Engine:
        """Reads it.

        Args:
            path: Where it is.
            mmap: Leave what can stay there on disk; nothing can be added or removed then.

        Raises:
            ValueError: The file holds no FAISS index.
        """
        faiss = _faiss()
        try:
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mmap else 0))
        except (RuntimeError, MemoryError) as error:
            raise ValueError(f"{path} is not a FAISS index that can be read ({_reason(error)}).") from error


def _search(index: Any, queries: Vectors, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    result: tuple[NDArray[np.float32], NDArray[np.int64]] = index.search(queries, count)
    return result


def _transformed(index: Any, vectors: Vectors) -> Vectors:
    faiss = _faiss()
    for place in range(index.chain.size()):
        vectors = faiss.downcast_VectorTransform(index.chain.at(place)).apply(vectors)
    return vectors


def _below_transform(index: Any) -> Any:
    faiss = _faiss()
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def _innermost(index: Any) -> Any:
    """What holds the vectors: below refinement and transforms."""
    faiss = _faiss()
    if isinstance(index, faiss.IndexRefine):
        index = faiss.downcast_index(index.base_index)
    return _below_transform(index)


def _reason(error: BaseException) -> str:
    """FAISS's message without where in its sources it was raised."""
    return str(error).strip().splitlines()[-1].split(": ", 1)[-1].strip() or type(error).__name__
