"""Parts of the judge's page: who replaced what was removed, whether effects add up, and removal in rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from wherefrom.counterfactual.effects import number, or_nan, or_none
from wherefrom.counterfactual.reattribution import shown_file
from wherefrom.metrics.standard_error import estimate
from wherefrom.reports.html import Markup, tag
from wherefrom.reports.images import foreign, image_tag

Stored = Mapping[str, Any]
STYLE = """
h2{margin-top:2rem}table.judge{overflow-wrap:normal;font-variant-numeric:tabular-nums}
ol.taken{display:flex;gap:.5rem;list-style:none;text-align:left}
ol.taken li{width:5.5rem;font-size:.7rem;line-height:1.3;overflow-wrap:anywhere}
ol.taken .gone img{opacity:.45}ol.taken .gone b{color:var(--tick)}
"""
_SIDE = 64
_NOTHING = (None, None)
_FORESEEN = {
    "spearman": "Spearman, before and after",
    "control_spearman": "another seed: Spearman",
    "share": "foreseen",
    "control_share": "another seed: foreseen",
    "chance": "by chance",
}


def sections(folder: Path, result: Stored) -> list[Markup]:
    """What a judgement asked beyond the ordinary removals; nothing where it did not.

    Args:
        folder: The run folder.
        result: What `counterfactual.json` holds.

    Raises:
        ValueError: An image in the folder cannot be read.
    """
    return [
        *_pairs(result["rows"]),
        *_groups(result.get("groups", [])),
        *_greedy(result.get("greedy", []), result.get("not_greedy", [])),
        *_after(folder, result),
    ]


def table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> Markup:
    """A table of the judge's."""
    head = tag("tr", *(tag("th", title) for title in titles))
    return tag("table", head, *(tag("tr", *(tag("td", cell) for cell in line)) for line in lines), class_="judge")


def paired(rows: Sequence[Stored], k: int) -> dict[tuple[str, str], tuple[float, float]]:
    """Differences of ΔL own − others between the methods of one K, query by query: mean and standard error.

    Args:
        rows: The rows of `counterfactual.json`.
        k: Which K.

    Returns:
        (method, other method) -> of the first minus the second, over the queries that both were judged on; NaN where
        there are no such queries.
    """
    result: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["k"] == k:
            values = or_nan(row["loss"]["own"]) - or_nan(row["loss"]["others"])
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
        parts.append(tag("div", tag("table", head, *lines, class_="judge"), class_="scroll"))
    if not parts:
        return []
    return [
        tag("h2", "Which differences hold?"),
        tag(
            "p",
            "ΔL own − others of the row's method minus that of the column's, query by query. Queries differ more than "
            "methods do, so these standard errors are smaller than those of the table above. Bold: more than two of "
            "them; among many pairs some are so by chance.",
        ),
        *parts,
    ]


def _difference(mean: float, error: float) -> Markup | str:
    if not np.isfinite(mean):
        return "–"
    text = number(or_none([mean, error]))
    return tag("b", text) if abs(mean) > 2 * error else text


def _groups(groups: Sequence[Stored]) -> list[Markup]:
    if not groups:
        return []
    lines = []
    for each in groups:
        result = each["estimates"]
        shown = [number(result[name]) for name in ("first", "second", "both", "synergy")]
        lines.append([foreign(each["method"]), str(each["k"]), str(len(each["queries"])), *shown])
    return [
        tag("h2", "Do effects add up?"),
        tag(
            "p",
            "Each query's top K cut in two, the odd places (A) and the even ones (B): what is lost without A, without "
            "B, and without both. Synergy is what both do beyond the sum: above 0, each half stands in for the other.",
        ),
        table(["method", "K", "n", "ΔL(A)", "ΔL(B)", "ΔL(A ∪ B)", "synergy"], lines),
    ]


def _greedy(greedy: Sequence[Stored], unmoved: Sequence[str]) -> list[Markup]:
    if not greedy and not unmoved:
        return []
    lines = []
    for each in greedy:
        result, (mine, theirs) = each["estimates"], each["removed"]
        shown = [number(result[name]) for name in ("greedy", "at_once", "difference")]
        counts = [str(each["k"]), str(each["rounds"]), str(len(each["queries"])), f"{mine:.0f} / {theirs:.0f}"]
        lines.append([foreign(each["method"]), *counts, *shown])
    titles = ["method", "K", "rounds", "n", "left out, in rounds / at once", "ΔL in rounds", "ΔL at once", "difference"]
    without = (
        f"Not for {', '.join(unmoved)}: a method that asks no model ranks what is left as before, so its removal in "
        "rounds is that at once."
    )
    return [
        tag("h2", "In rounds, or all at once?"),
        tag(
            "p",
            "In rounds, the queries are attributed again under the model that was trained without what the rounds "
            "before took away.",
        ),
        *([table(titles, lines)] if lines else []),
        *([tag("p", without)] if unmoved else []),
    ]


def _after(folder: Path, result: Stored) -> list[Markup]:
    collected: Sequence[Stored] = result.get("after", [])
    if not collected:
        return []
    lines = [
        [
            foreign(each["method"]),
            str(each["k"]),
            str(each["queries"]),
            *(number(each.get(name, _NOTHING)) for name in _FORESEEN),
        ]
        for each in result["foresight"]
    ]
    prompts, captions = result["prompts"], result["shown"]
    images = [
        tag(
            "tr",
            tag("th", foreign(each["method"]), f", K = {each['k']}"),
            tag("td", foreign(prompts[each["query"]])),
            tag("td", _taken(folder, each["before"], captions, each["removed"])),
            tag("td", _taken(folder, each["after"], captions, [])),
        )
        for each in collected
    ]
    head = tag("tr", *(tag("th", title) for title in ("", "query", "first before", "first after")))
    return [
        tag("h2", "Who replaced them?"),
        tag(
            "p",
            "The queries attributed again, under the model that was trained without the images of their pool, among "
            "those that are left. Foreseen: the share of the top K afterwards that stood in the K places directly "
            "below what was removed; by chance: that of a random order. Another seed: the same, had the model been "
            "trained with all images and another seed; only what differs from it is the removal's doing.",
        ),
        table(["method", "K", "n", *_FORESEEN.values()], lines),
        tag("div", tag("table", head, *images, class_="judge replaced"), class_="scroll"),
    ]


def _taken(folder: Path, ids: Sequence[str], captions: Mapping[str, str], removed: Sequence[str]) -> Markup:
    items = []
    for name in ids:
        gone = name in removed
        label = [tag("b", "removed"), " "] if gone else []
        words = tag("span", *label, foreign(name, 40), " ", foreign(captions.get(name, ""), 60))
        items.append(tag("li", _thumbnail(folder, name), words, class_="gone" if gone else None))
    return tag("ol", *items, class_="taken")


def _thumbnail(folder: Path, name: str) -> str:
    path = shown_file(folder, name)
    if not path.exists():
        return "–"
    try:
        with Image.open(path) as opened:
            return image_tag(np.asarray(opened.convert("RGB")), _SIDE, f"Training image {name}")
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
