"""The page's sections, from a hand-made table of results; text from outside stays inert."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from tests.support.evaluations import HOSTILE, effect, evaluated, row
from wherefrom.counterfactual.effect_table import with_error
from wherefrom.counterfactual.replacements import shown_file
from wherefrom.counterfactual.report import CURVES, write_counterfactual_report
from wherefrom.counterfactual.report_sections import paired
from wherefrom.counterfactual.results_file import COUNTERFACTUAL

IDS = ["old/1", "old/2", HOSTILE]


def further(folder: Path) -> None:
    """An evaluation with all that can be asked beside the ordinary removals."""
    result = evaluated(folder)
    result["rows"][1]["loss"] = effect(0.4, 0.5, mismatched=0.1)
    estimates = {"first": [0.1, 0.01], "second": [0.2, 0.02], "both": [0.5, 0.05], "deviation": [0.2, None]}
    rounds = {"iterative": [0.7, 0.07], "at_once": [0.5, 0.05], "difference": [0.2, 0.03]}
    common = {"method": "pixel", "k": 4, "queries": ["a", "b"]}
    after = {"method": "pixel", "k": 4, "query": "b", "model": "without", "before": IDS, "removed": IDS[:1]}
    result |= {
        "costs": {"pixel": {"seconds": 2.5, "memory": 10, "stored": 3 * 2**20}},
        "additivity": [{**common, "estimates": estimates}],
        "iterative_removal": [{**common, "rounds": 2, "removed": [8.0, 7.0], "estimates": rounds}],
        "without_iterative_removal": ["caption"],
        "reattribution": [
            {
                **after,
                "after": IDS[1:],
                "prediction": {"spearman": 0.5, "share": 1.0, "chance": 0.1},
            }
        ],
        "replacement_prediction": [
            {**common, "queries": 1, "spearman": [0.5, None], "share": [1.0, None], "chance": [0.1, None]},
            {
                **{**common, "method": "caption", "queries": 2, "chance": [0.2, 0.0]},
                **{"spearman": [0.4, 0.01], "share": [0.6, 0.02]},
                **{"control_spearman": [0.5, 0.03], "control_share": [0.7, 0.04]},
            },
        ],
        "captions": dict.fromkeys(IDS, HOSTILE),
    }
    (folder / COUNTERFACTUAL).write_text(json.dumps(result))
    for level, name in enumerate(IDS[1:]):
        path = shown_file(folder, name)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 50 * level, np.uint8)).save(path)


def test_the_page_shows_what_was_asked(tmp_path: Path) -> None:
    further(tmp_path)
    page, _ = write_counterfactual_report(tmp_path)
    html = page.read_text()
    assert HOSTILE not in html
    assert re.search(r"<td>2.5</td><td>3</td>", html), "seconds a query and MiB"
    cells = "".join(f"<td>{cell}</td>" for cell in ("0.1 ± 0.01", "0.2 ± 0.02", "0.5 ± 0.05", "0.2"))
    assert f"<td>2</td>{cells}" in html
    assert "<td>8 / 7</td><td>0.7 ± 0.07</td><td>0.5 ± 0.05</td><td>0.2 ± 0.03</td>" in html
    assert "Not for caption: a method that uses no model" in html
    assert "<td>1</td><td>0.5</td><td>–</td><td>1</td><td>–</td><td>0.1</td>" in html, "evaluated by one seed"
    cells = "".join(f"<td>{cell}</td>" for cell in ("0.4 ± 0.01", "0.5 ± 0.03", "0.6 ± 0.02", "0.7 ± 0.04"))
    assert f"<td>2</td>{cells}" in html
    before, after = re.findall(r'<ol class="removed">(.*?)</ol>', html)
    assert before.count("<li") == 3
    assert before.count('<li class="gone">–<span><b>removed</b>') == 1, "its image was deleted"
    assert after.count("<img") == 2
    assert "removed" not in after


def test_differences_are_taken_query_by_query(tmp_path: Path) -> None:
    result, nothing = evaluated(tmp_path), effect(*[None] * 3, mismatched=None)
    pixel = {
        **row("pixel", 4, 0.0),
        "queries": ["a", "b", "c"],
        "loss": effect(0.5, 0.9, 0.4, mismatched=0.1),
        "mse": nothing,
        "similarity": nothing,
    }
    caption = {**pixel, "method": "caption", "queries": ["c", "b", "a"], "loss": effect(0.3, 0.6, 0.4, mismatched=0.2)}
    result["rows"] = [pixel, caption, {**pixel, "k": 2}, row("seed-variance baseline", 0, 0.05)]
    collected = paired(result["rows"], 4)
    values = [0.4 - 0.2, 0.8 - 0.4, 0.3 - 0.1]
    assert collected["pixel", "caption"] == pytest.approx((np.mean(values), np.std(values, ddof=1) / 3**0.5))
    assert collected["caption", "pixel"] == pytest.approx((-np.mean(values), np.std(values, ddof=1) / 3**0.5))
    assert set(paired(result["rows"], 2)) == {("pixel", "pixel")}
    (tmp_path / COUNTERFACTUAL).write_text(json.dumps(result))
    html = write_counterfactual_report(tmp_path)[0].read_text()
    assert "<th><bdi>pixel</bdi></th><td></td><td><b>0.267 ± 0.067</b></td></tr>" in html
    assert "<th>K = 4</th><th><bdi>pixel</bdi></th><th><bdi>caption</bdi></th></tr>" in html
    assert "<th>K = 2</th>" not in html, "nothing to compare with"
    caption["loss"] = effect(0.3, 1.1, 0.4, mismatched=0.2)
    (tmp_path / COUNTERFACTUAL).write_text(json.dumps(result))
    assert "<td>0.1 ± 0.1</td>" in write_counterfactual_report(tmp_path)[0].read_text()


def test_effect_against_cost_is_one_more_panel(tmp_path: Path) -> None:
    def width() -> int:
        write_counterfactual_report(tmp_path)
        with Image.open(tmp_path / CURVES) as opened:
            return opened.size[0]

    further(tmp_path)
    result = json.loads((tmp_path / COUNTERFACTUAL).read_text())
    with_costs = width()
    added = ("iterative_removal", "without_iterative_removal", "reattribution", "replacement_prediction")
    for key in ("costs", "additivity", *added, "captions"):
        del result[key]
    (tmp_path / COUNTERFACTUAL).write_text(json.dumps(result))
    evaluate.main(["report", "--output", str(tmp_path)])
    assert with_costs == pytest.approx(width() * 4 / 3), "an evaluation without costs has three panels"


def test_an_image_that_is_none_is_refused(tmp_path: Path) -> None:
    further(tmp_path)
    shown_file(tmp_path, IDS[1]).write_text("no image")
    with pytest.raises(ValueError, match="is not an image that can be read"):
        write_counterfactual_report(tmp_path)


def test_numbers_without_error_or_mean() -> None:
    assert [with_error([0.5, 0.01]), with_error([0.5, None]), with_error([None, None])] == ["0.5 ± 0.01", "0.5", "–"]
    assert with_error([0.5, 2e-19]) == "0.5"
