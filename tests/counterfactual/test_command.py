"""All that the judge can be asked, through the command line on a tiny recipe, and once more without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import evaluate
from tests.support.tiny import training_config

pytestmark = pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty:UserWarning")
PROMPTS = ["red square", "blue circle"]
INFLUENCE = {"noise_samples": 2, "grid": {"timesteps": 1, "flips": False}, "curvature": {"class_path": "Identity"}}
ASKED = {"ks": [2], "pools": [2], "random": 0, "timesteps": 4, "after": 2, "groups": True, "greedy": 2}


def test_the_command_line_asks_further_and_goes_on_without_weights(tmp_path: Path) -> None:
    recipe = training_config(tmp_path, "recipe", steps=6, count=40)
    method = tmp_path / "influence.yaml"
    method.write_text(json.dumps({"class_path": "InfluenceFunction", "init_args": INFLUENCE}))
    config = {
        "recipe": str(recipe),
        "data": json.loads(recipe.read_text())["data"],
        "methods": [str(method)],
        "queries": {"prompts": PROMPTS, "sampling_steps": 2},
        "protocol": ASKED,
        "output": str(tmp_path / "judged"),
        "store": str(tmp_path / "store"),
    }
    path, output = tmp_path / "judge.yaml", tmp_path / "judged"
    path.write_text(json.dumps(config))
    evaluate.main(["counterfactual", "-c", str(path)])
    stored = json.loads((output / "counterfactual.json").read_text())
    (row,), (greedy,), (group,) = stored["rows"], stored["greedy"], stored["groups"]
    assert greedy["at_once"] == group["both"] == row["loss"]["own"]
    assert group["synergy"] == pytest.approx(
        [
            both - first - second
            for both, first, second in zip(group["both"], group["first"], group["second"], strict=True)
        ]
    )
    manifest = json.loads((output / "influence" / "manifest.json").read_text())
    seconds = [facts["seconds"] for facts in manifest["facts"].values()]
    assert stored["costs"]["influence"]["seconds"] == pytest.approx(sum(seconds) / 2)
    assert stored["costs"]["influence"]["stored"] > 1000
    assert len(stored["after"]) == 2
    page = (output / "judge.html").read_text()
    assert page.count('<ol class="taken">') == 4
    assert page.count("<b>removed</b>") == sum(len(each["removed"]) for each in stored["after"]) >= 2

    manifests = {
        each: json.loads(each.read_text()) for each in (tmp_path / "store" / "retrain").glob("*/manifest.json")
    }
    left_out = [each for each, content in manifests.items() if content["identity"]["excluded_count"]]
    assert len(left_out) == len(manifests) - 1 >= 3
    for each in left_out:
        shutil.rmtree(each.parent)
    evaluate.main(["counterfactual", "-c", str(path)])
    assert not any(each.exists() for each in left_out), "trained again"
    assert json.loads((output / "counterfactual.json").read_text()) == stored
