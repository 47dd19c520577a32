"""All analyses of the evaluation, through the command line on a tiny recipe, and once more without weights."""

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
ADDED = {"reattributed_queries": 2, "additivity_groups": True, "iterative_removal_rounds": 2}
ASKED = {"ks": [2], "query_groups": [2], "random": 0, "timesteps": 4, **ADDED}


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
        "output": str(tmp_path / "evaluated"),
        "store": str(tmp_path / "store"),
    }
    path, output = tmp_path / "experiment.yaml", tmp_path / "evaluated"
    path.write_text(json.dumps(config))
    evaluate.main(["counterfactual", "-c", str(path)])
    stored = json.loads((output / "counterfactual.json").read_text())
    (row,), (iterative,), (group,) = (stored[name] for name in ("rows", "iterative_removal", "additivity"))
    assert iterative["at_once"] == group["both"] == row["loss"]["matched"]
    assert group["deviation"] == pytest.approx(
        [
            both - first - second
            for both, first, second in zip(group["both"], group["first"], group["second"], strict=True)
        ]
    )
    manifest = json.loads((output / "influence" / "manifest.json").read_text())
    seconds = [facts["seconds"] for facts in manifest["facts"].values()]
    assert stored["costs"]["influence"]["seconds"] == pytest.approx(sum(seconds) / 2)
    assert stored["costs"]["influence"]["stored"] > 1000
    assert len(stored["reattribution"]) == 2
    page = (output / "counterfactual.html").read_text()
    assert page.count('<ol class="removed">') == 4
    assert page.count("<b>removed</b>") == sum(len(each["removed"]) for each in stored["reattribution"]) >= 2

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
