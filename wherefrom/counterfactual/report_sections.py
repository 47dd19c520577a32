"""Sections of the page: paired differences, additivity, iterative removal, and replacements of removed images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from wherefrom.counterfactual.effect_table import with_error
from wherefrom.counterfactual.replacements import shown_file
from wherefrom.counterfactual.results_file import or_nan, or_none
from wherefrom.metrics.standard_error import estimate
from wherefrom.reports.html import Markup, tag
from wherefrom.reports.images import foreign, image_tag

Stored = Mapping[str, Any]
STYLE = """
h2{margin-top:2rem}table.effects{overflow-wrap:normal;font-variant-numeric:tabular-nums;font-size:.85rem}
h2+p{max-width:60rem;margin:.5rem 0 1rem;color:var(--quiet);font-size:.9rem}
details{margin:1rem 0;font-size:.9rem}summary{color:var(--accent);cursor:pointer}details dl{max-width:60rem}
details dl div{display:grid;grid-template-columns:11rem 1fr;gap:1rem;padding:.35rem 0;
border-bottom:1px solid var(--line)}
ol.removed{display:flex;gap:.5rem;list-style:none;text-align:left}
ol.removed li{width:5.5rem;font-size:.7rem;line-height:1.3;overflow-wrap:anywhere}
ol.removed .gone img{opacity:.45}ol.removed .gone b{color:var(--tick)}
"""
_SIDE = 64
_NOTHING = (None, None)
_PREDICTION = {
    "spearman": "Spearman, before and after",
    "control_spearman": "another seed: Spearman",
    "share": "predicted",
    "control_share": "another seed: predicted",
    "chance": "by chance",
}


def sections(folder: Path, result: Stored) -> list[Markup]:
    """Sections on what was asked beyond the ordinary removals; none for what was not.

    Args:
        folder: The run folder.
        result: What `counterfactual.json` holds, by today's keys.

    Raises:
        ValueError: An image in the folder cannot be read.
    """
    return [
        *_pairs(result["rows"]),
        *_additivity(result.get("additivity", [])),
        *_iterative(result.get("iterative_removal", []), result.get("without_iterative_removal", [])),
        *_replacements(folder, result),
    ]


def table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> Markup:
    """A table of the page."""
    head = tag("tr", *(tag("th", title) for title in titles))
    return tag("table", head, *(tag("tr", *(tag("td", cell) for cell in line)) for line in lines), class_="effects")


def explanation(title: str, words: Mapping[str, str]) -> Markup:
    """Words of a table and their meaning, shown on a click.

    Args:
        title: What is clicked.
        words: Word -> meaning.
    """
    lines = [tag("div", tag("dt", word), tag("dd", meaning)) for word, meaning in words.items()]
    return tag("details", tag("summary", title), tag("dl", *lines))


def paired(rows: Sequence[Stored], k: int) -> dict[tuple[str, str], tuple[float, float]]:
    """Differences of matched − mismatched ΔL between methods, query by query: mean and standard error.

    Args:
        rows: The rows of `counterfactual.json`.
        k: Which K.

    Returns:
        (method, other method) -> of the first minus the second, over the queries that both were evaluated on; NaN where
        there are no such queries.
    """
    result: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["k"] == k:
            values = or_nan(row["loss"]["matched"]) - or_nan(row["loss"]["mismatched"])
            result[row["method"]] = dict(zip(row["queries"], values.tolist(), strict=True))
    return {
        (first, second): estimate(np.array([mine[query] - theirs[query] for query in sorted({*mine} & {*theirs})]))
        for first, mine in result.items()
        for second, theirs in result.items()
    }


def _pairs(rows: Sequence[Stored]) -> list[Markup]:
    parts: list[Markup] = []
    for k in sorted({row["k"] for row in rows if row["k"]}):
        methods = [row["method"] for row in rows if row["k"] == k]
        result = paired(rows, k)
        if len(methods) < 2 or not np.isfinite([mean for mean, _ in result.values()]).any():
            continue
        lines = []
        for first in methods:
            cells = [_difference(*result[first, second]) if first != second else "" for second in methods]
            lines.append(tag("tr", tag("th", foreign(first)), *(tag("td", cell) for cell in cells)))
        head = tag("tr", tag("th", f"K = {k}"), *(tag("th", foreign(method)) for method in methods))
        parts.append(tag("div", tag("table", head, *lines, class_="effects"), class_="scroll"))
    if not parts:
        return []
    return [
        tag("h2", "Which differences between methods hold?"),
        tag(
            "p",
            "Matched − mismatched ΔL of the row's method minus that of the column's, query by query: above 0, the "
            "row's method is better. Queries differ more than methods do, so these standard errors are smaller than "
            "those of the table above. Bold: more than two standard errors; among many pairs some are so by chance.",
        ),
        *parts,
    ]


def _difference(mean: float, error: float) -> Markup | str:
    if not np.isfinite(mean):
        return "–"
    text = with_error(or_none([mean, error]))
    return tag("b", text) if abs(mean) > 2 * error else text


def _additivity(additivity: Sequence[Stored]) -> list[Markup]:
    if not additivity:
        return []
    lines = []
    for each in additivity:
        result = each["estimates"]
        shown = [with_error(result[name]) for name in ("first", "second", "both", "deviation")]
        lines.append([foreign(each["method"]), str(each["k"]), str(len(each["queries"])), *shown])
    return [
        tag("h2", "Additivity: do effects add up?"),
        tag(
            "p",
            "Each query's top K is cut in two, the odd places (A) and the even ones (B): the effect of removing A, of "
            "removing B, and of removing both. The deviation is the effect of both minus the sum of the two: above 0, "
            "each half can replace the other, so that neither alone shows what they matter together.",
        ),
        table(["method", "K", "n", "ΔL(A)", "ΔL(B)", "ΔL(A ∪ B)", "deviation from additivity"], lines),
    ]


def _iterative(iterative: Sequence[Stored], unmoved: Sequence[str]) -> list[Markup]:
    if not iterative and not unmoved:
        return []
    lines = []
    for each in iterative:
        result, (mine, theirs) = each["estimates"], each["removed"]
        shown = [with_error(result[name]) for name in ("iterative", "at_once", "difference")]
        counts = [str(each["k"]), str(each["rounds"]), str(len(each["queries"])), f"{mine:.0f} / {theirs:.0f}"]
        lines.append([foreign(each["method"]), *counts, *shown])
    titles = ["method", "K", "rounds", "n", "removed, in rounds / at once", "ΔL in rounds", "ΔL at once", "difference"]
    without = (
        f"Not for {', '.join(unmoved)}: a method that uses no model ranks what is left as before, so its removal in "
        "rounds is that at once."
    )
    return [
        tag("h2", "Iterative removal: in rounds, or all at once?"),
        tag(
            "p",
            "In rounds, the queries are attributed again under the model that was trained without the images of the "
            "rounds before. A difference above 0 says that this finds images which the first ranking missed.",
        ),
        *([table(titles, lines)] if lines else []),
        *([tag("p", without, class_="quiet")] if unmoved else []),
    ]


def _replacements(folder: Path, result: Stored) -> list[Markup]:
    collected: Sequence[Stored] = result.get("reattribution", [])
    if not collected:
        return []
    lines = [
        [
            foreign(each["method"]),
            str(each["k"]),
            str(each["queries"]),
            *(with_error(each.get(name, _NOTHING)) for name in _PREDICTION),
        ]
        for each in result["replacement_prediction"]
    ]
    prompts, captions = result["prompts"], result["captions"]
    images = [
        tag(
            "tr",
            tag("th", foreign(each["method"]), f", K = {each['k']}"),
            tag("td", foreign(prompts[each["query"]])),
            tag("td", _ranked(folder, each["before"], captions, each["removed"])),
            tag("td", _ranked(folder, each["after"], captions, [])),
        )
        for each in collected
    ]
    head = tag("tr", *(tag("th", title) for title in ("", "query", "first before", "first after")))
    return [
        tag("h2", "Re-attribution: which images take over?"),
        tag(
            "p",
            "The queries attributed again, under the model that was trained without the images of their query group, "
            "among those that are left. Predicted: the share of the top K afterwards that stood in the K places "
            "directly below what was removed; by chance: that of a random order. Another seed: the same, had the model "
            "been trained with all images and another seed; only what differs from it comes from the removal.",
        ),
        table(["method", "K", "n", *_PREDICTION.values()], lines),
        tag("div", tag("table", head, *images, class_="effects replaced"), class_="scroll"),
    ]


def _ranked(folder: Path, ids: Sequence[str], captions: Mapping[str, str], removed: Sequence[str]) -> Markup:
    items = []
    for name in ids:
        gone = name in removed
        label = [tag("b", "removed"), " "] if gone else []
        words = tag("span", *label, foreign(name, 40), " ", foreign(captions.get(name, ""), 60))
        items.append(tag("li", _thumbnail(folder, name), words, class_="gone" if gone else None))
    return tag("ol", *items, class_="removed")


def _thumbnail(folder: Path, name: str) -> str:
    path = shown_file(folder, name)
    if not path.exists():
        return "–"
    try:
        with Image.open(path) as opened:
            return image_tag(np.asarray(opened.convert("RGB")), _SIDE, f"Training image {name}")
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
