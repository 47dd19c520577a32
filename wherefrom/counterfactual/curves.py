"""Curves of a counterfactual evaluation: effects against K, and effect against cost, as one image."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

from wherefrom.counterfactual.effect_table import CounterfactualRow
from wherefrom.counterfactual.removal import RANDOM
from wherefrom.counterfactual.results_file import SEED_BASELINE
from wherefrom.metrics.standard_error import estimate
from wherefrom.runtime.measured_cost import Cost

_PANELS = (
    ("loss", "matched", "ΔL of the query (matched)"),
    ("loss", "difference", "ΔL, matched − mismatched"),
    ("mse", "matched", "MSE of its image"),
    ("similarity", "matched", "similarity of its image"),
)
# Twice ten, so that eleven methods and more differ: the strong ones first.
_COLOURS = [colormaps["tab20"](place) for place in (*range(0, 20, 2), *range(1, 20, 2))]
_MARKERS = "osD^vPX*"  # of each K, beside one another
_STORED = (0.1, 1, 10, 100, 1_000)  # MiB, in the legend


def draw_curves(rows: Sequence[CounterfactualRow], costs: Mapping[str, Cost]) -> NDArray[np.uint8]:
    """The panels that have numbers, side by side.

    Args:
        rows: The rows of the table.
        costs: Method -> what its attributions took; without any, there is no panel of effect against cost.

    Returns:
        Pixels (H, W, 3).
    """
    shown = [
        (kind, part, title)
        for kind, part, title in _PANELS
        if any(np.isfinite(_values(row, kind, part)).any() for row in rows)
    ]
    timed = _with_seconds(rows, costs)
    count = len(shown) + bool(timed)
    figure = Figure(figsize=(4.2 * count, 3.8), dpi=100, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, (kind, part, title) in zip(axes, shown, strict=False):
        axis.set_prop_cycle(color=_COLOURS)
        _panel(axis, rows, kind, part)
        axis.set_title(title)
        axis.set_xlabel("images removed for each query (K)")
    handles, labels = axes[0].get_legend_handles_labels()
    if timed:
        colours = {
            label: handle[0].get_color() for handle, label in zip(handles, labels, strict=True) if label in costs
        }
        _effect_against_cost(axes[-1], timed, costs, colours)
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return np.asarray(Image.open(stream).convert("RGB"))


def _values(row: CounterfactualRow, kind: str, part: str) -> Float[NDArray[np.float64], " q"]:
    result: Float[NDArray[np.float64], " q"] = getattr(getattr(row, kind), part)
    return result


def _with_seconds(rows: Sequence[CounterfactualRow], costs: Mapping[str, Cost]) -> list[CounterfactualRow]:
    """The rows with a matched − mismatched effect, of methods whose seconds are known."""
    return [
        row
        for row in rows
        if row.method in costs and costs[row.method].seconds > 0 and np.isfinite(row.loss.difference).any()
    ]


def _effect_against_cost(
    axis: Axes, rows: Sequence[CounterfactualRow], costs: Mapping[str, Cost], colours: Mapping[str, Any]
) -> None:
    """One point a method and K: its place shows the seconds, its size the bytes."""
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
    axis.set_title("ΔL, matched − mismatched, against cost")
    axis.set_xlabel("seconds a query")


def _width(stored: float) -> float:
    """Diameter of a point in pt: 4 up to 0.1 MiB, 3 more for each factor of ten."""
    return 4 + 3 * max(0.0, math.log10(max(stored, 1) / 2**20 / _STORED[0]))


def _panel(axis: Axes, rows: Sequence[CounterfactualRow], kind: str, part: str) -> None:
    own = [method for method in dict.fromkeys(row.method for row in rows) if method not in (SEED_BASELINE, RANDOM)]
    for method in dict.fromkeys(row.method for row in rows):
        mine = sorted((row for row in rows if row.method == method), key=lambda row: row.k)
        ks = np.array([row.k for row in mine], dtype=np.float64)
        means, errors = np.array([estimate(_values(row, kind, part)) for row in mine]).T
        if method == SEED_BASELINE:
            if np.isfinite(means[0]):
                axis.axhline(means[0], color="black", linestyle="--", linewidth=1, label=SEED_BASELINE)
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
    ks_shown = sorted({row.k for row in rows if row.k})
    axis.set_xticks(ks_shown, [str(k) for k in ks_shown])
    axis.minorticks_off()
