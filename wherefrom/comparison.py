"""Several methods on the same queries: what each costs, how far they agree, and their first pictures side by side."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import spearmanr

from wherefrom.attribution import attribute
from wherefrom.attributors.base import Attributor, Query, Say, Scores, TrainingData, silent
from wherefrom.data.pictures import Pictures
from wherefrom.diffusion import DiffusionModel
from wherefrom.markup import Markup, shorten, tag
from wherefrom.page import write_page
from wherefrom.query_page import ReportOptions
from wherefrom.report import prompt_tag
from wherefrom.report_pictures import foreign, picture_tag, thumbnail_row
from wherefrom.runner import Runner
from wherefrom.storage import Store, replacing, write_json

COST, METHODS, CORRELATIONS, REPORT = "cost.json", "methods.parquet", "correlations.parquet", "report.html"
_QUERY = 128
_SAMPLE_EVERY_S = 0.1
_STYLE = """
.methods{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;margin:1rem 0}
.methods th,.methods td{padding:.3rem .8rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
.methods th:first-child{text-align:left}
"""


@dataclass(frozen=True)
class Cost:
    """What a method took for these queries, on the machine that ran it.

    Attributes:
        seconds: Mean seconds a query, without what is made once. Not the median: a method that serves many queries by
            one pass has all its seconds before the first of them.
        memory: Largest resident memory of the process while it ran, in bytes.
        stored: Bytes that answer these queries together: the run folder, and what the method made or found in the
            store, whichever method made it.
    """

    seconds: float
    memory: int
    stored: int


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Yields a list whose one number is the largest resident memory seen while the block runs, in bytes."""
    process, done = psutil.Process(), threading.Event()
    largest = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(_SAMPLE_EVERY_S):
            largest[0] = max(largest[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield largest
    finally:
        done.set()
        thread.join()
        largest[0] = max(largest[0], process.memory_info().rss)


def _size(*folders: Path) -> int:
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def correlations(
    results: Mapping[str, Sequence[Scores]],
) -> tuple[Float[NDArray[np.float64], "m m"], Float[NDArray[np.float64], "m m"]]:
    """Spearman correlation of every two methods' scores, its mean and standard error over the queries.

    Not a number where a method scores all pictures alike; the standard error of a single query is not a number either.
    """
    names = list(results)
    count = len(next(iter(results.values())))
    found = np.ones((len(names), len(names), count))
    for i, first in enumerate(names):
        for j in range(i):
            for query in range(count):
                left, right = results[first][query].scores, results[names[j]][query].scores
                constant = np.ptp(left) == 0 or np.ptp(right) == 0
                value = float("nan") if constant else float(spearmanr(left, right).statistic)
                found[i, j, query] = found[j, i, query] = value
    error = found.std(axis=2, ddof=1) / np.sqrt(count) if count > 1 else np.full(found.shape[:2], np.nan)
    return found.mean(axis=2), error


def compare(
    folder: Path,
    methods: Mapping[str, Attributor],
    data: TrainingData,
    model: DiffusionModel | None,
    queries: Sequence[Query],
    store: Store,
    runner: Runner,
    options: ReportOptions = ReportOptions(),
    say: Say = silent,
) -> dict[str, list[Scores]]:
    """Runs every method on the same queries and leaves one table, one table of correlations and one report.

    Each method's run folder is below `folder`, as `attribute` leaves it; finished queries are not scored again.

    Args:
        folder: The run folder.
        methods: Name -> method, in the order of the table.
        data: Training pictures and the null.
        model: The model, for methods that require one.
        queries: The queries.
        store: Where methods keep what they make.
        runner: This process's place.
        options: What the pages show.
        say: Is told what is being done.

    Raises:
        ValueError: There are no methods; or see the attributors.
        ArtifactMismatchError: A method's folder holds a run with other settings.
        StorageError: The folder could not be written; finished queries are kept.
    """
    if not methods:
        raise ValueError("There are no methods to compare: name attributor files in `methods`.")
    results: dict[str, list[Scores]] = {}
    costs: dict[str, Cost] = {}
    for number, (name, method) in enumerate(methods.items(), start=1):
        say(f"{name}: method {number} of {len(methods)}")
        results[name], costs[name] = attribute_at_cost(
            folder / name, method, data, model, queries, store, runner, options, say
        )
    if runner.is_main:
        _write_tables(folder, results, costs)
        _write_report(folder / REPORT, results, costs, data.pictures, options)
    runner.barrier()
    return results


def attribute_at_cost(
    place: Path,
    method: Attributor,
    data: TrainingData,
    model: DiffusionModel | None,
    queries: Sequence[Query],
    store: Store,
    runner: Runner,
    options: ReportOptions = ReportOptions(),
    say: Say = silent,
) -> tuple[list[Scores], Cost]:
    """Attributes as `attribute` does, and measures what that takes, which the main process keeps in `cost.json`.

    The other processes say what it took by their own clock, and nothing of what is stored.
    """
    before = _size(place)
    # A store of its own tells what this method used, also where another has made or used it before.
    own = Store(store.root)
    with watched_memory() as memory:
        results = attribute(place, method, data, model, queries, own, runner, options, say)
    for artifact, made in own.touched.items():
        store.touched[artifact] = store.touched.get(artifact, False) or made
    if not runner.is_main:
        return results, Cost(_seconds(results), memory[0], 0)
    now = Cost(_seconds(results), memory[0], _size(place, *own.touched))
    return results, _cost(place, now, scored=_size(place) > before)


def _seconds(results: Sequence[Scores]) -> float:
    return float(np.mean([scores.facts.get("seconds", float("nan")) for scores in results]))


def _cost(place: Path, now: Cost, scored: bool) -> Cost:
    """The cost of this run, or of the parts that an interrupted one measured before, whichever is larger."""
    cost = now
    if (place / COST).exists():
        earlier = Cost(**json.loads((place / COST).read_text()))
        memory, stored = max(now.memory, earlier.memory), max(now.stored, earlier.stored)
        cost = Cost(now.seconds, memory, stored) if scored else replace(earlier, seconds=now.seconds)
    write_json(place / COST, asdict(cost))
    return cost


def _reliability(results: Sequence[Scores]) -> float:
    found = [scores.facts["split_half_reliability"] for scores in results if "split_half_reliability" in scores.facts]
    return float(np.median(found)) if found else float("nan")


def _write_tables(folder: Path, results: Mapping[str, Sequence[Scores]], costs: Mapping[str, Cost]) -> None:
    names = list(results)
    columns = {
        "method": names,
        "seconds_per_query": [costs[name].seconds for name in names],
        "peak_memory_bytes": [costs[name].memory for name in names],
        "stored_bytes": [costs[name].stored for name in names],
        "split_half_reliability": [_reliability(results[name]) for name in names],
    }
    with replacing(folder / METHODS) as temporary:
        pq.write_table(pa.table(columns), temporary)
    mean, error = correlations(results)
    pairs = [(i, j) for i in range(len(names)) for j in range(len(names))]
    with replacing(folder / CORRELATIONS) as temporary:
        pq.write_table(
            pa.table(
                {
                    "method": [names[i] for i, _ in pairs],
                    "other": [names[j] for _, j in pairs],
                    "spearman": [mean[pair] for pair in pairs],
                    "standard_error": [error[pair] for pair in pairs],
                }
            ),
            temporary,
        )


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "–"


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    head = tag("tr", *[tag("th", foreign(cell)) for cell in header])
    body = [
        tag("tr", tag("th", foreign(first), scope="row"), *[tag("td", cell) for cell in rest]) for first, *rest in rows
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body), class_="methods"), class_="scroll")


def _write_report(
    path: Path,
    results: Mapping[str, Sequence[Scores]],
    costs: Mapping[str, Cost],
    pictures: Pictures,
    options: ReportOptions,
) -> None:
    names = list(results)
    mean, error = correlations(results)
    table = [
        [
            name,
            _number(costs[name].seconds),
            _number(costs[name].memory / 2**30),
            _number(costs[name].stored / 2**20),
            _number(_reliability(results[name])),
        ]
        for name in names
    ]
    agreement = [
        [name, *(f"{_number(mean[i, j])} ± {_number(error[i, j])}" if i != j else "1" for j in range(len(names)))]
        for i, name in enumerate(names)
    ]
    where = {name: index for index, name in enumerate(pictures.ids)}
    sections = [
        _query_section(number, [results[name][number - 1] for name in names], names, pictures, where, options.top)
        for number in range(1, len(results[names[0]]) + 1)
    ]
    cost_titles = ["method", "seconds a query", "peak memory, GiB", "stored, MiB", "split-half reliability"]
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", foreign(options.title)),
            tag("p", "The same generated pictures by several methods: the highest-ranked of each.", class_="lead"),
        ),
        tag("h2", "What each costs"),
        _rows(cost_titles, table),
        tag(
            "p",
            "Seconds are means, without what a method makes once for a model. Stored: the rankings, and all that the "
            "method keeps to make them.",
            class_="quiet",
        ),
        tag("h2", "How far they agree"),
        _rows(["Spearman correlation of scores", *names], agreement),
        tag("p", "Mean over the generated pictures, and its standard error.", class_="quiet"),
        tag("main", *sections),
    )
    write_page(path, options.title, body, _STYLE)


def _query_section(
    number: int,
    scores: Sequence[Scores],
    names: Sequence[str],
    pictures: Pictures,
    where: Mapping[str, int],
    top: int,
) -> Markup:
    query = scores[0].query
    shown = query.pixels if query.region is None else query.region.show(query.pixels)
    rows = []
    for name, each in zip(names, scores, strict=True):
        thumbnails = []
        for rank, (image, _) in enumerate(each.top(top), start=1):
            index = where[image]
            words = f"{rank}. {shorten(pictures.captions[index][0], 100)} ({shorten(image, 100)})"
            thumbnails.append((np.asarray(pictures.pixels[index]), words))
        rows.append(thumbnail_row(tag("b", foreign(name)), thumbnails))
    return tag(
        "section",
        tag(
            "div",
            tag("div", picture_tag(shown, _QUERY, f"Generated picture {number}"), class_="frame"),
            tag("h2", prompt_tag(query.prompt)),
            tag("p", foreign(query.name), class_="id"),
            class_="query",
        ),
        tag("div", *rows),
    )
