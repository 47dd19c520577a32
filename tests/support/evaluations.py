"""Results of a counterfactual evaluation, with images, as its report reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from wherefrom.counterfactual.generated_images import images_folder, write_strip
from wherefrom.counterfactual.results_file import COUNTERFACTUAL

HOSTILE = "<script>alert(1)</script>"


def effect(*matched: float | None, mismatched: float | None = 0.0) -> dict[str, list[float | None]]:
    return {"matched": list(matched), "mismatched": [mismatched] * len(matched)}


def row(method: str, k: int, matched: float) -> dict[str, Any]:
    nothing = effect(None, None, mismatched=None)
    return {
        "method": method,
        "k": k,
        "removed": 2.0 * k,
        "random_equivalent": [30.0, 20.0, None] if method == "pixel" else None,
        "queries": ["a", "b"],
        "loss": effect(matched, matched + 0.1),
        "mse": effect(matched / 10, matched / 10),
        "similarity": nothing,
    }


def evaluated(folder: Path) -> dict[str, Any]:
    """An evaluation of one method, and what two models drew."""
    models = [
        {"name": "whole", "seed": 0, "method": "all images", "k": 0, "queries": []},
        {"name": "without", "seed": 0, "method": "pixel", "k": 4, "queries": ["a", "b"]},
        {"name": "gone", "seed": 0, "method": "random", "k": 4, "queries": ["a", "b"]},
    ]
    result = {
        "protocol": {"ks": [2, 4], "seeds": [0, 1], "timesteps": 10},
        "prompts": {"b": HOSTILE, "a": "a fox"},
        "encoder": None,
        "training_images": 40,
        "models": models,
        "rows": [
            row("pixel", 2, 0.2),
            row("pixel", 4, 0.4),
            row("random", 4, 0.1),
            row("seed-variance baseline", 0, 0.05),
        ],
    }
    (folder / COUNTERFACTUAL).write_text(json.dumps(result))
    for name, level in (("whole", 0), ("without", 100)):
        images = {query: np.full((8, 8, 3), level + index, np.uint8) for index, query in enumerate(("a", "b"))}
        write_strip(images_folder(folder) / f"{name}.png", images)
    return result
