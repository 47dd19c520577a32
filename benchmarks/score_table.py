"""The highest of very many scores: parquet parts read in row groups, against reading and sorting the whole.

    python -m benchmarks.score_table
    python -m benchmarks.score_table --rows 100000000 --queries 2

Makes a table of random scores (by default 10⁷ images, 4 queries), finds the first 1,000 of each query, and says how
long that took and how much memory it added, each in a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from experiments.support.arguments import script_parser
from wherefrom.rankings.ranking_file import order_of
from wherefrom.rankings.score_table import PART_ROWS, ScoreTable
from wherefrom.runtime.artifacts import write_json
from wherefrom.runtime.console import peak_memory

RESULT = Path("results/score_table.json")


def write(folder: Path, rows: int, queries: int) -> None:
    """A table of random scores, part by part."""
    table = ScoreTable(folder, [f"query {number}" for number in range(queries)])
    for number, start in enumerate(range(0, rows, PART_ROWS)):
        count = min(PART_ROWS, rows - start)
        scores = np.random.default_rng([0, number]).standard_normal((queries, count))
        table.write(number, [f"{row:012d}" for row in range(start, start + count)], scores)


def merge(folder: Path, k: int) -> list[list[str]]:
    """The first k of each query, by the table."""
    table = ScoreTable(folder)
    return [table.top(query, k)[0] for query in table.queries]


def sort(folder: Path, k: int) -> list[list[str]]:
    """The first k of each query, by sorting everything."""
    table = ScoreTable(folder)
    read = pq.read_table(table.parts())
    ids = read["image"].to_pylist()
    result = []
    for place in range(len(table.queries)):
        scores = read[str(place)].to_numpy()
        result.append([ids[row] for row in order_of(ids, scores)[:k]])
    return result


def _child(work: Callable[..., Any], arguments: tuple[Any, ...], answers: Any) -> None:
    before, started = peak_memory(), time.perf_counter()
    result = work(*arguments)
    answers.put((result, time.perf_counter() - started, peak_memory() - before))


def alone(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float, int]:
    """What the work gives, its seconds and the bytes of memory that it added, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_child, args=(work, arguments, answers))
    process.start()
    result: tuple[Any, float, int] = answers.get()
    process.join()
    return result


def main() -> None:
    """Measures and prints."""
    parser = script_parser(__doc__)
    parser.add_argument("--rows", type=int, default=10**7)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--k", type=int, default=1000)
    parser.add_argument("--no-sort", action="store_true", help="leave out the whole sort, which holds everything")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="scores-"))
    try:
        _, write_s, write_bytes = alone(write, folder, options.rows, options.queries)
        disk = sum(path.stat().st_size for path in folder.iterdir())
        result, merge_s, merge_bytes = alone(merge, folder, options.k)
        measured = {
            "rows": options.rows,
            "queries": options.queries,
            "k": options.k,
            "disk_bytes": disk,
            "write": {"seconds": write_s, "bytes": write_bytes},
            "merge": {"seconds": merge_s, "bytes": merge_bytes},
        }
        if not options.no_sort:
            whole, sort_s, sort_bytes = alone(sort, folder, options.k)
            assert whole == result, "both find the same images"
            measured["sort"] = {"seconds": sort_s, "bytes": sort_bytes}
    finally:
        shutil.rmtree(folder)
    print(json.dumps(measured, indent=2))
    write_json(RESULT, {"command": "python -m benchmarks.score_table", **measured})


if __name__ == "__main__":
    main()
