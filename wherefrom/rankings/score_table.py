"""Score table for very large training sets: Parquet parts, with top-k queries in bounded memory.

A part holds a range of images: the column `image`, and one column of scores per query, named by its position among
the queries, whose ids are in `queries.json`. Parts are written atomically, in any order and by any process, so a table
can be filled by several nodes and resumed; queries read it part by part and, within a part, by row groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.rankings.ranking_file import order_of
from wherefrom.runtime.artifacts import replacing, storage_errors, write_json
from wherefrom.runtime.checked_files import read_list

QUERIES, PART_ROWS, GROUP_ROWS = "queries.json", 2**20, 2**17


class ScoreTable:
    """Table of scores in a folder.

    Args:
        folder: Folder of the parts.
        queries: Ids of the queries, in the order of the columns; None reads them from the folder.

    Raises:
        ValueError: There is no table to read, or the folder holds a table of other queries.
        StorageError: The folder could not be written.
    """

    def __init__(self, folder: Path, queries: Sequence[str] | None = None) -> None:
        self.folder, queries_file = folder, folder / QUERIES
        kept: Any = read_list(queries_file, "Give another folder") if queries_file.exists() else None
        if kept is None and queries is None:
            raise ValueError(f"{folder} holds no table of scores: it has no {QUERIES}.")
        if kept is not None and queries is not None and list(queries) != kept:
            raise ValueError(
                f"{folder} holds scores of other queries ({len(kept)}: {kept[:3]} …). Choose another folder."
            )
        self.queries: list[str] = list(kept if queries is None else queries)
        if kept is None:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_json(queries_file, self.queries)

    def part(self, number: int) -> Path:
        """Returns the path of a part."""
        return self.folder / f"part-{number:08d}.parquet"

    def parts(self) -> list[Path]:
        """Lists the parts on disk, in order."""
        return sorted(self.folder.glob("part-*.parquet"))

    def write(self, number: int, ids: Sequence[str], scores: Float[NDArray[np.float64], "q n"]) -> None:
        """Writes one part, replacing an earlier part of that number.

        Raises:
            ValueError: A score is not finite, or the numbers of scores and of ids or queries differ.
            StorageError: The file could not be written.
        """
        if scores.shape != (len(self.queries), len(ids)):
            raise ValueError(
                f"Part {number} has scores of shape {scores.shape}, but {len(self.queries)} queries and {len(ids)} ids."
            )
        if not np.isfinite(scores).all():
            query, image = (int(place[0]) for place in np.nonzero(~np.isfinite(scores)))
            raise ValueError(f"Image {ids[image]!r} scores {scores[query, image]} for query {self.queries[query]!r}.")
        columns = {"image": pa.array(list(ids), pa.string())}
        columns |= {str(place): pa.array(row, pa.float64()) for place, row in enumerate(scores)}
        with replacing(self.part(number)) as temporary:
            pq.write_table(pa.table(columns), temporary, row_group_size=GROUP_ROWS, use_dictionary=False)

    def __len__(self) -> int:
        """Number of images in all parts."""
        return sum(pq.read_metadata(path).num_rows for path in self.parts())

    def top(self, query: str, k: int) -> tuple[list[str], Float[NDArray[np.float64], " k"]]:
        """Finds the k highest scores of a query, highest first and ties by id, with their images.

        Memory is that of one row group and of k rows, however many parts there are.

        Args:
            query: Id of the query.
            k: Number of images; all if there are fewer.

        Raises:
            ValueError: The query is not in the table, or k is not positive.
        """
        if query not in self.queries:
            raise ValueError(f"{self.folder} has no query {query!r}; it has {', '.join(self.queries[:5])} …")
        if k < 1:
            raise ValueError(f"k must be at least 1; given {k}.")
        ids: list[str] = []
        best = np.empty(0)
        for group, scores in self._groups(str(self.queries.index(query))):
            least = best[-1] if len(best) == k else -np.inf
            chosen = np.flatnonzero(scores >= least)
            if len(chosen) > k:  # ties with the k-th stay, so that ids decide between them
                least = np.partition(scores[chosen], len(chosen) - k)[len(chosen) - k]
                chosen = chosen[scores[chosen] >= least]
            if len(chosen):
                ids += pc.take(group, pa.array(chosen)).to_pylist()
                best = np.concatenate([best, scores[chosen]])
                order = order_of(ids, best)[:k]
                ids, best = [ids[place] for place in order], best[order]
        return ids, best

    def _groups(self, column: str) -> Iterator[tuple[pa.Array, Float[NDArray[np.float64], " n"]]]:
        for path in self.parts():
            with pq.ParquetFile(path) as file:
                for number in range(file.num_row_groups):
                    group = file.read_row_group(number, columns=["image", column])
                    yield group["image"].combine_chunks(), group[column].to_numpy()
