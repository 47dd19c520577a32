"""Planted near-duplicates: where they stand by hand, and the benchmark on a tiny recipe over a few emoji."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import near_duplicates
from experiments.near_duplicates import standing
from tests.support.tiny import tiny_folder, training_config
from wherefrom.runtime.artifacts import Store

pytestmark = pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty:UserWarning")


def test_copies_are_found_before_and_after() -> None:
    first, gone = ["a", "x", "a/copy1", "b", "y", "a/copy2"], ["a", "b"]
    result = standing(first, ["a/copy2", "a/copy1", "x", "y"], "a", ["a/copy1", "a/copy2"], gone)
    assert (result.original, result.copies, result.left, result.after) == (1, [3, 6], [2, 4], [2, 1])
    assert (result.share, result.chance) == (0.5, 0.5), "of the two that lead afterwards, copy1 was next"
    # What is left, x copy1 y copy2, is now at the places 2 1 3 0.
    assert result.spearman == pytest.approx(1 - 6 * (4 + 0 + 1 + 9) / (4 * 15))


def test_the_benchmark_runs_on_a_tiny_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = training_config(tmp_path, "recipe", steps=6)
    config = json.loads(recipe.read_text())
    settings = config["data"]["init_args"]
    del settings["folder"]
    settings["options"] = {"size": 8, "concepts": [0.0, 0.01]}
    config["data"]["class_path"] = "Emoji"
    recipe.write_text(json.dumps(config))
    influence = {"noise_samples": 2, "grid": {"timesteps": 1, "flips": False}, "curvature": {"class_path": "Identity"}}
    methods = {"influence": {"class_path": "InfluenceFunction", "init_args": influence}}
    methods["pixel"] = {"class_path": "PixelSimilarity"}
    for name, content in methods.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
    command = ["--recipe", str(recipe), "--originals", "2", "--sampling-steps", "2", "--timesteps", "4"]
    command += ["--settings", "{}", "--store", str(tmp_path / "store"), "--output", str(tmp_path / "out")]
    command += ["--results", str(tmp_path / "found.json")]
    command += ["--methods", *(str(tmp_path / f"{name}.yaml") for name in methods)]
    near_duplicates.main(command)
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "found.json").read_text())
    originals = result["copies"]["ids"]
    assert len(originals) == 2
    manifests = (tmp_path / "store" / "retrain").glob("*/manifest.json")
    assert sorted(json.loads(each.read_text())["identity"]["excluded_count"] for each in manifests) == [0, 2, 6]
    assert set(result["loss"]) == {"originals", "originals and copies"}
    changes = [value for by in result["loss"].values() for value in by.values()]
    assert all(value != 0 for value in changes)
    for method in methods:
        for original in originals:
            one = result["standings"][method][original]
            assert len(one["copies"]) == len(one["left"]) == len(one["after"]) == 2
            assert all(left <= first for left, first in zip(one["left"], one["copies"], strict=True))
    for one in result["standings"]["pixel"].values():
        assert (one["left"], one["spearman"], one["share"]) == (one["after"], 1.0, 1.0), "pixels ask no model"
    assert "| pixel | " in printed
    assert "2 queries over " in printed


def test_data_without_copies_is_refused(tmp_path: Path) -> None:
    recipe = training_config(tmp_path, "recipe", steps=6)
    tiny_folder(tmp_path / "pictures")
    with pytest.raises(ValueError, match="which cannot plant copies; Emoji can"):
        near_duplicates.planted(recipe, copies=2, store=Store(tmp_path / "store"), output=tmp_path / "out")
