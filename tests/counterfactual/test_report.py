"""The page of a counterfactual evaluation shows what was measured, and text from outside stays inert."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import evaluate
from wherefrom.counterfactual.generated_images import images_folder, read_strip, write_strip
from wherefrom.counterfactual.report import CURVES, PAGE, write_counterfactual_report
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


def test_the_page_shows_curves_table_and_images(tmp_path: Path) -> None:
    evaluated(tmp_path)
    page, curves = write_counterfactual_report(tmp_path)
    assert (page, curves) == (tmp_path / PAGE, tmp_path / CURVES)
    html = page.read_text()
    assert HOSTILE not in html
    assert "&lt;script&gt;" in html
    assert html.count("<tr>") == 1 + 4 + 1 + 2 + 1 + 2, "a line for each row, each of two methods and each query"
    assert re.search(
        r"<td>pixel</td><td>4</td><td>8</td><td>2</td><td>0.45 ± 0.05</td><td>0</td>.*<td>30 \(20 to inf\)</td>", html
    )
    images = re.findall(r"<td>(<img[^>]*>|–)</td>", html.split("Images before")[1])
    assert [each == "–" for each in images] == [False, False, True] * 2, "what was deleted is left out"
    assert len(set(images)) == 5, "each query and model has an image of its own"
    assert html.count("data:image/png") == 1 + 4
    with Image.open(curves) as opened:
        width, height = opened.size
    assert width > 3 * height / 1.2, "three panels: no encoder was given"
    before = curves.read_bytes(), html
    evaluate.main(["report", "--output", str(tmp_path)])
    assert (curves.read_bytes(), page.read_text()) == before


def test_an_evaluation_of_one_k_and_no_images(tmp_path: Path) -> None:
    result = evaluated(tmp_path)
    result["rows"] = [row("pixel", 4, 0.4), row("random", 4, 0.1)]
    (tmp_path / COUNTERFACTUAL).write_text(json.dumps(result))
    for path in (images_folder(tmp_path)).iterdir():
        path.unlink()
    page, _ = write_counterfactual_report(tmp_path)
    assert "Images before" not in page.read_text()


def test_strips_are_read_as_they_were_written_and_wrong_ones_refused(tmp_path: Path) -> None:
    evaluated(tmp_path)
    path = images_folder(tmp_path) / "without.png"
    result = read_strip(path, ["b", "a"])
    assert (result["a"] == 100).all()
    assert (result["b"] == 101).all()
    with pytest.raises(ValueError, match="16 pixels wide, which is no multiple of its 3 queries"):
        read_strip(path, ["a", "b", "c"])
    path.write_text("no image")
    with pytest.raises(ValueError, match="is not an image that can be read"):
        write_counterfactual_report(tmp_path)


def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run evaluate\.py counterfactual with this output first"):
        write_counterfactual_report(tmp_path)
    (tmp_path / COUNTERFACTUAL).write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        write_counterfactual_report(tmp_path)
    (tmp_path / COUNTERFACTUAL).write_text('{"rows": []}')
    with pytest.raises(ValueError, match="lacks 'encoder'"):
        write_counterfactual_report(tmp_path)
