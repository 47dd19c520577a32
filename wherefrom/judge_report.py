"""The judge's results to look at: curves against K, the pictures before and after, the table."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from wherefrom.changes import estimate
from wherefrom.counterfactual import FLOOR, PICTURES, RESULT, Row, as_table
from wherefrom.evaluation.removal import RANDOM, Effect
from wherefrom.markup import Markup, tag
from wherefrom.page import write_page
from wherefrom.report_pictures import foreign, picture_tag, png_data_uri
from wherefrom.storage import replacing
from wherefrom.sweep import read_strip

PAGE, CURVES = "judge.html", "judge.png"
_PANELS = (
    ("loss", "own", "ΔL of the query"),
    ("loss", "difference", "ΔL own − others"),
    ("mse", "own", "MSE of its picture"),
    ("similarity", "own", "similarity of its picture"),
)
_STYLE = "table.judge td, table.judge th { padding: 0.2em 0.6em; text-align: right; } img.curves { max-width: 100%; }"


def write_judge_report(folder: Path) -> tuple[Path, Path]:
    """Draws the curves, the pictures before and after, and the table of a judgement, as HTML and PNG.

    Args:
        folder: A run folder of `evaluate.py counterfactual`.

    Returns:
        The page and the picture of the curves.

    Raises:
        ValueError: The folder holds no judgement, or a file in it cannot be read.
        StorageError: A file could not be written.
    """
    result = _read(folder / RESULT)
    rows = [_row(each) for each in result["rows"]]
    curves = _curves(rows)
    with replacing(folder / CURVES) as temporary:
        Image.fromarray(curves).save(temporary, "PNG")
    encoder = result["encoder"]
    facts = (
        f"{result['training_pictures']:,} training pictures; seeds {', '.join(map(str, result['protocol']['seeds']))}; "
        f"losses on {result['protocol']['timesteps']} timesteps; pictures drawn from the same noise"
        + (f"; similarity by {encoder}." if encoder else ".")
    )
    assumption = (
        "One retraining leaves out the pictures of all queries of a pool. Own: changes of the queries whose pictures "
        "went; others: of the same queries where only the pictures of other queries went. Own minus others assumes "
        "that the pictures of other queries do to a query what they do to any. Band: as many pictures left out at "
        "random. Dashed: another seed, with all pictures. Error bars are standard errors over queries."
    )
    body = tag(
        "body",
        tag("h1", "Retrained without the pictures named"),
        tag("p", facts),
        tag("img", src=png_data_uri(curves), alt="Changes against K, by method", class_="curves"),
        tag("p", assumption),
        _table(rows),
        *_pictures(folder, result),
    )
    write_page(folder / PAGE, "Retrained without the pictures named", body, _STYLE)
    return folder / PAGE, folder / CURVES


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: run evaluate.py counterfactual with this output first.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): run evaluate.py counterfactual again.") from error
    missing = {"rows", "models", "prompts", "protocol", "encoder", "training_pictures"} - set(found)
    if missing:
        raise ValueError(f"{path} lacks {min(missing)!r}: run evaluate.py counterfactual again.")
    return found


def _row(stored: dict[str, Any]) -> Row:
    def effect(kind: str) -> Effect:
        own, others = (np.array(stored[kind][name], dtype=np.float64) for name in ("own", "others"))
        return Effect(tuple(stored["queries"]), own, others)

    kinds = (effect("loss"), effect("mse"), effect("similarity"))
    rungs = stored["equivalent"]
    first, low, high = (float("inf") if each is None else each for each in rungs or (0.0, 0.0, 0.0))
    equivalent = None if rungs is None else (first, low, high)
    return Row(stored["method"], stored["k"], stored["removed"], *kinds, equivalent)


def _values(row: Row, kind: str, part: str) -> Float[NDArray[np.float64], "q"]:
    found: Float[NDArray[np.float64], "q"] = getattr(getattr(row, kind), part)
    return found


def _curves(rows: list[Row]) -> NDArray[np.uint8]:
    """The panels that have numbers, side by side."""
    shown = [
        (kind, part, title)
        for kind, part, title in _PANELS
        if any(np.isfinite(_values(row, kind, part)).any() for row in rows)
    ]
    figure = Figure(figsize=(4.2 * len(shown), 3.8), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (kind, part, title) in zip(axes, shown, strict=True):
        _panel(axis, rows, kind, part)
        axis.set_title(title)
        axis.set_xlabel("pictures left out for each query (K)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return np.asarray(Image.open(stream).convert("RGB"))


def _panel(axis: Axes, rows: list[Row], kind: str, part: str) -> None:
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
            axis.errorbar(ks, means, np.nan_to_num(errors), marker="o", markersize=4, capsize=3, label=method)
    axis.set_xscale("log")
    axis.set_xticks(sorted({row.k for row in rows if row.k}), [str(k) for k in sorted({r.k for r in rows if r.k})])
    axis.minorticks_off()


def _table(rows: list[Row]) -> Markup:
    lines = [line.strip("| ").split(" | ") for line in as_table(rows).splitlines()]
    head = tag("tr", *(tag("th", title) for title in lines[0]))
    return tag("table", head, *(tag("tr", *(tag("td", cell) for cell in line)) for line in lines[2:]), class_="judge")


def _pictures(folder: Path, result: dict[str, Any]) -> list[Markup]:
    """Each query as the whole model draws it, and without the pictures that each method named, at the largest K."""
    prompts, seed = result["prompts"], result["protocol"]["seeds"][0]
    largest = max(result["protocol"]["ks"])
    models = [each for each in result["models"] if each["seed"] == seed and each["k"] in (0, largest)]
    files = {each["name"]: folder / PICTURES / f"{each['name']}.png" for each in models}
    drawn = {name: read_strip(path, list(prompts)) for name, path in files.items() if path.exists()}
    columns = list(dict.fromkeys(each["method"] for each in models))
    lines = []
    for query in dict.fromkeys(name for each in models for name in each["queries"]):
        cells = []
        for method in columns:
            owner = next(
                each for each in models if each["method"] == method and (method == FLOOR or query in each["queries"])
            )
            picture = drawn.get(owner["name"], {}).get(query)
            cells.append(
                tag("td", "–" if picture is None else picture_tag(picture, 64, f"without {method}'s pictures"))
            )
        lines.append(tag("tr", tag("th", foreign(prompts[query])), *cells))
    if not lines or not drawn:
        return []
    titles = ["all pictures" if method == FLOOR else method for method in columns]
    head = tag("tr", tag("th", ""), *(tag("th", title) for title in titles))
    return [
        tag("h2", f"Pictures before, and without the {largest} that each method named"),
        tag("table", head, *lines, class_="judge"),
    ]
