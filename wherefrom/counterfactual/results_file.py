"""Results files of the counterfactual evaluation and of the linear datamodeling score, of this release or before.

Files are written with today's keys. Those that an earlier release wrote are read as if they had them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

COUNTERFACTUAL, DATAMODELING = "counterfactual.json", "lds.json"
SEED_BASELINE = "seed-variance baseline"  # the row of models with another seed and all images
ALL_IMAGES = "all images"  # the model that nothing was left out for
_SEED_BASELINE_BEFORE = "another seed"
RESERVED = frozenset({SEED_BASELINE, ALL_IMAGES, _SEED_BASELINE_BEFORE})  # no method's names
_COMMANDS = {COUNTERFACTUAL: "counterfactual", DATAMODELING: "lds"}

# Key before -> key now, at each place.
_TOP = {
    "training_pictures": "training_images",
    "groups": "additivity",
    "greedy": "iterative_removal",
    "not_greedy": "without_iterative_removal",
    "after": "reattribution",
    "foresight": "replacement_prediction",
    "shown": "captions",
    "halves": "random_subsets",
}
_PROTOCOL = {
    "pools": "query_groups",
    "ladder": "random_removal_curve",
    "ladder_draws": "random_removal_samples",
    "after": "reattributed_queries",
    "groups": "additivity_groups",
    "greedy": "iterative_removal_rounds",
}
_EFFECT = {"own": "matched", "others": "mismatched"}
_ADDITIVITY = {"synergy": "deviation"}
_ITERATIVE = {"greedy": "iterative", "pools": "query_groups"}
_REATTRIBUTION = {"foresight": "prediction"}


def read_results(path: Path, required: Collection[str] = ()) -> dict[str, Any]:
    """What `counterfactual.json` or `lds.json` holds, by today's keys.

    Args:
        path: The file, as this release or an earlier one wrote it.
        required: Keys that must be there.

    Raises:
        ValueError: The file is missing, is no JSON object, or lacks a key.
    """
    command = f"evaluate.py {_COMMANDS.get(path.name, 'counterfactual')}"
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: run {command} with this output first.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): run {command} again.") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is not a table of results: run {command} again.")
    try:
        result = _by_todays_keys(stored)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of results ({error!r}): run {command} again.") from error
    missing = set(required) - set(result)
    if missing:
        raise ValueError(f"{path} lacks {min(missing)!r}: run {command} again.")
    return result


def _by_todays_keys(stored: Mapping[str, Any]) -> dict[str, Any]:
    result = _renamed(stored, _TOP)
    if "protocol" in result:
        result["protocol"] = _renamed(result["protocol"], _PROTOCOL)
    parts: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "rows": _row,
        "models": _model,
        "additivity": lambda each: _with_estimates(each, _ADDITIVITY),
        "iterative_removal": lambda each: _with_estimates(each, _ITERATIVE),
        "reattribution": lambda each: _renamed(each, _REATTRIBUTION),
    }
    for name, translate in parts.items():
        if name in result:
            result[name] = [translate(each) for each in result[name]]
    return result


def _renamed(stored: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in stored.items()}


def _row(stored: Mapping[str, Any]) -> dict[str, Any]:
    result = _renamed(stored, {"equivalent": "random_equivalent"})
    kinds = [kind for kind in ("loss", "mse", "similarity") if isinstance(result.get(kind), Mapping)]
    result |= {kind: _renamed(result[kind], _EFFECT) for kind in kinds}
    # Rows of lds.json, which have no effects, still call their ceiling so.
    if kinds and result["method"] == _SEED_BASELINE_BEFORE:
        result["method"] = SEED_BASELINE
    return result


def _model(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {**stored, "method": ALL_IMAGES} if stored["method"] == _SEED_BASELINE_BEFORE else dict(stored)


def _with_estimates(stored: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    result = _renamed(stored, names)
    return result | {"estimates": _renamed(result["estimates"], names)}


def or_none(values: Sequence[float] | Float[NDArray[np.float64], " q"]) -> list[float | None]:
    """Numbers as JSON has them: null where there is none."""
    return [float(value) if np.isfinite(value) else None for value in values]


def or_nan(values: Sequence[float | None]) -> Float[NDArray[np.float64], " q"]:
    """Numbers from JSON: NaN where there is none."""
    return np.array(values, dtype=np.float64)
