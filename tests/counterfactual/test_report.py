"""The page of a counterfactual evaluation shows what was measured, and text from outside stays inert."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

import evaluate
from tests.support.evaluations import HOSTILE, evaluated, row
from wherefrom.counterfactual.generated_images import images_folder, read_strip
from wherefrom.counterfactual.report import CURVES, PAGE, write_counterfactual_report
from wherefrom.counterfactual.results_file import COUNTERFACTUAL


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
