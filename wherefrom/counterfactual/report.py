"""The judge's results to look at: curves against K, effect against cost, the images before and after, the tables."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

from wherefrom.counterfactual.effects import or_nan
from wherefrom.counterfactual.evaluate import FLOOR, IMAGES, RESULT, Row, as_table
from wherefrom.counterfactual.measurements import read_strip
from wherefrom.counterfactual.removal import RANDOM, Effect
from wherefrom.counterfactual.report_sections import STYLE, sections, table
from wherefrom.metrics.standard_error import estimate
from wherefrom.reports.html import Markup, tag, write_page
from wherefrom.reports.images import foreign, image_tag, png_data_uri
from wherefrom.runtime.artifacts import replacing
from wherefrom.runtime.measured_cost import Cost

PAGE, CURVES = "judge.html", "judge.png"
_PANELS = (
    ("loss", "own", "ΔL of the query"),
    ("loss", "difference", "ΔL own − others"),
    ("mse", "own", "MSE of its image"),
    ("similarity", "own", "similarity of its image"),
)
# Twice ten, so that the house's eleven methods differ: the strong ones first.
_COLOURS = [colormaps["tab20"](place) for place in (*range(0, 20, 2), *range(1, 20, 2))]
_MARKERS = "osD^vPX*"  # of each K, beside one another
_STORED = (0.1, 1, 10, 100, 1_000)  # MiB, in the legend
_STYLE = (
    STYLE
    + "table.judge td, table.judge th { padding: 0.2em 0.6em; text-align: right; } img.curves { max-width: 100%; }"
    + "table.judge:not(.replaced) td { white-space: nowrap; }"
    # A narrow column must not shrink its images, nor prompts be broken word by word.
    + "table.judge td img { max-width: none; } table.judge th:first-child { min-width: 10em; }"
)


def write_judge_report(folder: Path) -> tuple[Path, Path]:
    """Draws the curves, the images before and after, and the table of a judgement, as HTML and PNG.

    Args:
        folder: A run folder of `evaluate.py counterfactual`.

    Returns:
        The page and the image of the curves.

    Raises:
        ValueError: The folder holds no judgement, or a file in it cannot be read.
        StorageError: A file could not be written.
    """
    result = _read(folder / RESULT)
    rows = [_row(each) for each in result["rows"]]
    costs = {name: Cost(**each) for name, each in result.get("costs", {}).items()}
    curves = _curves(rows, costs)
    with replacing(folder / CURVES) as temporary:
        Image.fromarray(curves).save(temporary, "PNG")
    encoder = result["encoder"]
    facts = (
        f"{result['training_pictures']:,} training images; seeds {', '.join(map(str, result['protocol']['seeds']))}; "
        f"losses on {result['protocol']['timesteps']} timesteps; images drawn from the same noise"
        + (f"; similarity by {encoder}." if encoder else ".")
    )
    assumption = (
        "One retraining leaves out the images of all queries of a pool. Own: changes of the queries whose images "
        "went; others: of the same queries where only the images of other queries went. Own minus others assumes "
        "that the images of other queries do to a query what they do to any. Where one pool takes all queries, "
        "others are queries that nothing was left out for, on the same models. Band: as many images left out at "
        "random. Dashed: another seed, with all images. Error bars are standard errors over queries."
        + (
            " Seconds a query are without what a method makes once for a model; stored are the rankings and all that "
            "the method keeps to make them." * bool(costs)
        )
    )
    body = tag(
        "body",
        tag("h1", "Retrained without the images named"),
        tag("p", facts),
        tag("img", src=png_data_uri(curves), alt="Changes against K, by method", class_="curves"),
        tag("p", assumption),
        tag("div", _table(rows, costs), class_="scroll"),
        *sections(folder, result),
        *_images(folder, result),
    )
    write_page(folder / PAGE, "Retrained without the images named", body, _STYLE)
    return folder / PAGE, folder / CURVES


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: run evaluate.py counterfactual with this output first.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): run evaluate.py counterfactual again.") from error
    missing = {"rows", "models", "prompts", "protocol", "encoder", "training_pictures"} - set(result)
    if missing:
        raise ValueError(f"{path} lacks {min(missing)!r}: run evaluate.py counterfactual again.")
    return result


def _row(stored: dict[str, Any]) -> Row:
    def effect(kind: str) -> Effect:
        own, others = (or_nan(stored[kind][name]) for name in ("own", "others"))
        return Effect(tuple(stored["queries"]), own, others)

    kinds = (effect("loss"), effect("mse"), effect("similarity"))
    rungs = stored["equivalent"]
    first, low, high = (float("inf") if each is None else each for each in rungs or (0.0, 0.0, 0.0))
    equivalent = None if rungs is None else (first, low, high)
    return Row(stored["method"], stored["k"], stored["removed"], *kinds, equivalent)


def _values(row: Row, kind: str, part: str) -> Float[NDArray[np.float64], " q"]:
    result: Float[NDArray[np.float64], " q"] = getattr(getattr(row, kind), part)
    return result


def _curves(rows: list[Row], costs: Mapping[str, Cost]) -> NDArray[np.uint8]:
    """The panels that have numbers, side by side."""
    shown = [
        (kind, part, title)
        for kind, part, title in _PANELS
        if any(np.isfinite(_values(row, kind, part)).any() for row in rows)
    ]
    dear = _dear(rows, costs)
    count = len(shown) + bool(dear)
    figure = Figure(figsize=(4.2 * count, 3.8), dpi=100, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, (kind, part, title) in zip(axes, shown, strict=False):
        axis.set_prop_cycle(color=_COLOURS)
        _panel(axis, rows, kind, part)
        axis.set_title(title)
        axis.set_xlabel("images left out for each query (K)")
    handles, labels = axes[0].get_legend_handles_labels()
    if dear:
        colours = {
            label: handle[0].get_color() for handle, label in zip(handles, labels, strict=True) if label in costs
        }
        _effect_against_cost(axes[-1], dear, costs, colours)
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return np.asarray(Image.open(stream).convert("RGB"))


def _dear(rows: list[Row], costs: Mapping[str, Cost]) -> list[Row]:
    """The rows with an effect of their own, of methods whose seconds are known."""
    return [
        row
        for row in rows
        if row.method in costs and costs[row.method].seconds > 0 and np.isfinite(row.loss.difference).any()
    ]


def _effect_against_cost(axis: Axes, rows: list[Row], costs: Mapping[str, Cost], colours: Mapping[str, Any]) -> None:
    """One point a method and K: where it stands says the seconds, how large it is the bytes."""
    marker = {k: _MARKERS[place % len(_MARKERS)] for place, k in enumerate(sorted({row.k for row in rows}))}
    for row in rows:
        mean, error = estimate(row.loss.difference)
        cost = costs[row.method]
        axis.errorbar(
            [cost.seconds],
            [mean],
            [np.nan_to_num(error)],
            marker=marker[row.k],
            color=colours[row.method],
            markersize=_width(cost.stored),
            alpha=0.8,
            capsize=3,
            linestyle="none",
        )
    shapes = [(shape, 6.0, f"K = {k}") for k, shape in marker.items()]
    largest = max(costs[row.method].stored for row in rows)
    shown = [mebibytes for mebibytes in _STORED if mebibytes * 2**20 <= largest] or [_STORED[0]]
    shapes += [(_MARKERS[0], _width(each * 2**20), f"{each:g} MiB stored") for each in shown]
    names = [
        Line2D([], [], color="grey", linestyle="none", marker=shape, markersize=width, label=label)
        for shape, width, label in shapes
    ]
    axis.legend(handles=names, frameon=False, fontsize="x-small", ncols=2)
    axis.set_xscale("log")
    axis.margins(x=0.2, y=0.3)
    axis.set_title("ΔL own − others against cost")
    axis.set_xlabel("seconds a query")


def _width(stored: float) -> float:
    """Of a point, in points of the page: 4 up to 0.1 MiB, 3 more for each factor of ten."""
    return 4 + 3 * max(0.0, math.log10(max(stored, 1) / 2**20 / _STORED[0]))


def _panel(axis: Axes, rows: list[Row], kind: str, part: str) -> None:
    own = [method for method in dict.fromkeys(row.method for row in rows) if method not in (FLOOR, RANDOM)]
    for method in dict.fromkeys(row.method for row in rows):
        mine = sorted((row for row in rows if row.method == method), key=lambda row: row.k)
        ks = np.array([row.k for row in mine], dtype=np.float64)
        means, errors = np.array([estimate(_values(row, kind, part)) for row in mine]).T
        if method == FLOOR:
            if np.isfinite(means[0]):
                axis.axhline(means[0], color="black", linestyle="--", linewidth=1, label=FLOOR)
        elif method == RANDOM:
            # A single K is a short band, not a line without width.
            wide = ks if len(ks) > 1 else np.array([ks[0] * 0.9, ks[0] * 1.1])
            means, errors = np.resize(means, len(wide)), np.nan_to_num(np.resize(errors, len(wide)))
            axis.fill_between(wide, means - errors, means + errors, color="lightgrey", label=RANDOM)
        else:
            # Side by side, so that error bars do not hide one another.
            beside = ks * 1.2 ** ((own.index(method) - (len(own) - 1) / 2) / len(own))
            axis.errorbar(beside, means, np.nan_to_num(errors), marker="o", markersize=4, capsize=3, label=method)
    axis.set_xscale("log")
    axis.set_xticks(sorted({row.k for row in rows if row.k}), [str(k) for k in sorted({r.k for r in rows if r.k})])
    axis.minorticks_off()


def _table(rows: list[Row], costs: Mapping[str, Cost]) -> Markup:
    lines = [line.strip("| ").split(" | ") for line in as_table(rows, costs).splitlines()]
    return table(lines[0], lines[2:])


def _images(folder: Path, result: dict[str, Any]) -> list[Markup]:
    """Each query as the whole model draws it, and without the images that each method named, at the largest K."""
    prompts, seed = result["prompts"], result["protocol"]["seeds"][0]
    largest = max(result["protocol"]["ks"])
    models = [each for each in result["models"] if each["seed"] == seed and each["k"] in (0, largest)]
    files = {each["name"]: folder / IMAGES / f"{each['name']}.png" for each in models}
    drawn = {name: read_strip(path, list(prompts)) for name, path in files.items() if path.exists()}
    columns = list(dict.fromkeys(each["method"] for each in models))
    lines = []
    for query in dict.fromkeys(name for each in models for name in each["queries"]):
        cells = []
        for method in columns:
            owner = next(
                each for each in models if each["method"] == method and (method == FLOOR or query in each["queries"])
            )
            image = drawn.get(owner["name"], {}).get(query)
            cells.append(tag("td", "–" if image is None else image_tag(image, 64, f"without {method}'s images")))
        lines.append(tag("tr", tag("th", foreign(prompts[query])), *cells))
    if not lines or not drawn:
        return []
    titles = ["all images" if method == FLOOR else method for method in columns]
    head = tag("tr", tag("th", ""), *(tag("th", title) for title in titles))
    return [
        tag("h2", f"Images before, and without the {largest} that each method named"),
        tag("div", tag("table", head, *lines, class_="judge"), class_="scroll"),
    ]
