"""Page of a comparison of methods: their costs, their agreement, and their first images side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from wherefrom.data.image_set import ImageSet
from wherefrom.metrics.rank_correlation import correlations
from wherefrom.metrics.ties import EQUAL
from wherefrom.queries.types import Scores
from wherefrom.reports.attribution_report import prompt_tag
from wherefrom.reports.html import Markup, shorten, tag, write_page
from wherefrom.reports.images import foreign, image_tag, thumbnail_row
from wherefrom.reports.query_section import ReportOptions
from wherefrom.runtime.measured_cost import Cost

_QUERY = 128
_NOTE = 2000  # longest warning shown, in characters


_STYLE = """
.methods{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;margin:1rem 0}
.methods th,.methods td{padding:.3rem .8rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
.methods th:first-child{text-align:left}
"""


def median_reliability(results: Sequence[Scores]) -> float:
    """Median split-half reliability over a method's queries; NaN where it is not known."""
    result = [scores.facts["split_half_reliability"] for scores in results if "split_half_reliability" in scores.facts]
    return float(np.median(result)) if result else float("nan")


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "–"


def _agreement(mean: float, error: float, count: int, queries: int) -> str:
    if not count:
        return f"undefined: {EQUAL}"
    left_out = f" ({count} of {queries}; else {EQUAL})" if count < queries else ""
    return f"{_number(mean)} ± {_number(error)}{left_out}"


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    head = tag("tr", *[tag("th", foreign(cell)) for cell in header])
    body = [
        tag("tr", tag("th", foreign(first), scope="row"), *[tag("td", cell) for cell in rest]) for first, *rest in rows
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body), class_="methods"), class_="scroll")


def write_comparison_report(
    path: Path,
    results: Mapping[str, Sequence[Scores]],
    costs: Mapping[str, Cost],
    images: ImageSet,
    options: ReportOptions,
) -> None:
    """Writes the page that sets methods side by side: their costs, their agreement and their first images.

    Args:
        path: The file.
        results: Method -> scores of all queries.
        costs: Method -> its cost.
        images: The training images.
        options: Title and number of images.

    Raises:
        StorageError: The file could not be written.
    """
    names = list(results)
    mean, error, counts = correlations({name: [each.scores for each in result] for name, result in results.items()})
    table = [
        [
            name,
            _number(costs[name].seconds),
            _number(costs[name].memory / 2**30),
            _number(costs[name].stored / 2**20),
            _number(median_reliability(results[name])),
        ]
        for name in names
    ]
    columns = range(len(names))
    agreement = [
        [name, *(_agreement(mean[i, j], error[i, j], counts[i, j], counts[i, i]) if i != j else "1" for j in columns)]
        for i, name in enumerate(names)
    ]
    where = {name: index for index, name in enumerate(images.ids)}
    sections = [
        _query_section(
            number,
            scores=[results[name][number - 1] for name in names],
            names=names,
            images=images,
            where=where,
            top=options.top,
        )
        for number in range(1, len(results[names[0]]) + 1)
    ]
    cost_titles = ["method", "seconds a query", "peak memory, GiB", "stored, MiB", "split-half reliability"]
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", foreign(options.title)),
            tag("p", "The same generated images by several methods: the highest-ranked of each.", class_="lead"),
            *(tag("p", foreign(note, _NOTE)) for note in options.notes),
        ),
        tag("h2", "What each costs"),
        _rows(cost_titles, table),
        tag(
            "p",
            "Seconds are means, without what a method makes once for a model. Stored: the rankings, and all that the "
            "method keeps to make them. Split-half reliability: how well the order would agree with that of a "
            "second measurement with other noise samples; 1 is perfect, below 0.8 the order is noisy.",
            class_="quiet",
        ),
        tag("h2", "How far they agree"),
        _rows(["Spearman correlation of scores", *names], agreement),
        tag(
            "p",
            "1: both methods give all training images the same order; 0: their orders have nothing in common. Mean "
            "over the generated images, and its standard error.",
            class_="quiet",
        ),
        tag("main", *sections),
    )
    write_page(path, options.title, body, _STYLE)


def _query_section(
    number: int,
    *,
    scores: Sequence[Scores],
    names: Sequence[str],
    images: ImageSet,
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
            words = f"{rank}. {shorten(images.captions[index][0], 100)} ({shorten(image, 100)})"
            thumbnails.append((np.asarray(images.pixels[index]), words))
        said = tag("span", " All scores are equal: this order is that of the names.", class_="quiet")
        rows.append(thumbnail_row(Markup(tag("b", foreign(name)) + (said if each.all_equal else "")), thumbnails))
    return tag(
        "section",
        tag(
            "div",
            tag("div", image_tag(shown, _QUERY, f"Generated image {number}"), class_="frame"),
            tag("h2", prompt_tag(query.prompt)),
            tag("p", foreign(query.name), class_="id"),
            class_="query",
        ),
        tag("div", *rows),
    )
