"""A table of results of a counterfactual evaluation, with images, as its report reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from wherefrom.counterfactual.evaluate import IMAGES, RESULT
from wherefrom.counterfactual.measurements import write_strip

HOSTILE = "<script>alert(1)</script>"


def effect(*own: float | None, others: float | None = 0.0) -> dict[str, list[float | None]]:
    return {"own": list(own), "others": [others] * len(own)}


def row(method: str, k: int, own: float) -> dict[str, Any]:
    nothing = effect(None, None, others=None)
    return {
        "method": method,
        "k": k,
        "removed": 2.0 * k,
        "equivalent": [30.0, 20.0, None] if method == "pixel" else None,
        "queries": ["a", "b"],
        "loss": effect(own, own + 0.1),
        "mse": effect(own / 10, own / 10),
        "similarity": nothing,
    }


def judged(folder: Path) -> dict[str, Any]:
    """A judgement of one method, and what two models drew."""
    models = [
        {"name": "whole", "seed": 0, "method": "another seed", "k": 0, "queries": []},
        {"name": "without", "seed": 0, "method": "pixel", "k": 4, "queries": ["a", "b"]},
        {"name": "gone", "seed": 0, "method": "random", "k": 4, "queries": ["a", "b"]},
    ]
    result = {
        "protocol": {"ks": [2, 4], "seeds": [0, 1], "timesteps": 10},
        "prompts": {"b": HOSTILE, "a": "a fox"},
        "encoder": None,
        "training_pictures": 40,
        "models": models,
        "rows": [row("pixel", 2, 0.2), row("pixel", 4, 0.4), row("random", 4, 0.1), row("another seed", 0, 0.05)],
    }
    (folder / RESULT).write_text(json.dumps(result))
    for name, level in (("whole", 0), ("without", 100)):
        images = {query: np.full((8, 8, 3), level + index, np.uint8) for index, query in enumerate(("a", "b"))}
        write_strip(folder / IMAGES / f"{name}.png", images)
    return result
