"""`experiments.scaling`: nested training sets, prompts that the smallest holds, and ranks computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.scaling import METADATA, Drawing, choose_prompts, ranks, write_folder, write_part
from wherefrom.attributors import Query, Scores, TrainingData
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder
from wherefrom.data.image_set import ImageSet
from wherefrom.runtime.artifacts import Store


def drawing(name: str, style: str, shade: int = 0) -> Drawing:
    return Drawing(name, style, "CC0", "nobody", np.full((32, 32, 3), shade, np.uint8))


def test_parts_are_the_first_images_of_the_whole(tmp_path: Path) -> None:
    chosen = [drawing(f"../thing {number}", "flat", number) for number in range(45)]
    write_folder(tmp_path / "whole", chosen)
    write_part(tmp_path / "part", tmp_path / "whole", 20)
    images = build_image_folder(Store(tmp_path / "store"), tmp_path / "part", ImageFolderOptions(32))
    assert [several[0] for several in images.captions] == [each.caption for each in chosen[:20]]
    assert [int(pixels[0, 0, 0]) for pixels in images.pixels] == list(range(20))
    assert images.columns["split"].count("validation") == 1
    with pytest.raises(SystemExit, match="There are 45 drawings; 46 are asked for"):
        write_part(tmp_path / "more", tmp_path / "whole", 46)


def test_prompts_are_trained_on_and_drawn_in_three_styles(tmp_path: Path) -> None:
    styles = ("flat", "round", "thin", "bold")
    chosen = [drawing(name, style) for name in ("fox", "owl", "elk") for style in styles]
    write_folder(tmp_path, [*chosen, drawing("rare", "flat"), drawing("rare", "thin")])
    prompts = choose_prompts(tmp_path, 3)
    assert {prompt.split(", ")[0] for prompt in prompts} == {"fox", "owl", "elk"}
    rows = [json.loads(line) for line in (tmp_path / METADATA).read_text().splitlines()]
    assert set(prompts) <= {row["text"] for row in rows if row["split"] == "train"}
    assert choose_prompts(tmp_path, 2) == prompts[:2]
    with pytest.raises(SystemExit, match="draws 3 things in three styles; 4 are needed"):
        choose_prompts(tmp_path, 4)


def test_ranks_of_the_own_image_and_of_other_styles() -> None:
    names = ("fox", "fox", "fox", "owl", "elk")
    captions = tuple((f"{name}, {style} style",) for name, style in zip(names, "abcaa", strict=True))
    ids = tuple("vwxyz")
    images = ImageSet(ids, captions, np.zeros((5, 2, 2, 3), np.uint8), {"name": names}, "five")
    query = Query("q", "fox, b style", np.zeros((2, 2, 3), np.uint8))
    # w is the image itself; of the other foxes v comes first and x fourth of five.
    scores = Scores(query, ids, np.array([9.0, 7.0, 3.0, 8.0, 2.0]), np.zeros(0), {})
    assert ranks([scores], TrainingData(images)) == {"own": [0.4], "other styles": [pytest.approx(0.3)]}
