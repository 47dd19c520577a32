"""What is committed is found again: identities do not depend on where a class lives or what a setting is called."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

import train
from lightning_modules.launch.recipe import Recipe
from wherefrom.commands.method_files import load_methods
from wherefrom.models.diffusion import TRAINING_VERSION
from wherefrom.runtime.artifacts import identity_hash

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "emoji"
EVALUATION = ROOT / "configs" / "experiment" / "emoji_1k_judge.yaml"


@pytest.fixture
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the recipe's own paths are relative to the checkout


@pytest.mark.usefixtures("in_checkout")
def test_the_recipe_of_the_committed_model_has_the_committed_identity(tmp_path: Path) -> None:
    kept = json.loads((ROOT / "weights" / "emoji_1k" / "manifest.json").read_text())["identity"]
    assert Recipe("configs/experiment/emoji_1k.yaml", tmp_path, train.main).identity() == kept["recipe"]
    assert kept["training_version"] == TRAINING_VERSION
    assert identity_hash(kept) == "692fbe907d539f3b"


@pytest.mark.usefixtures("in_checkout")
def test_every_model_of_the_committed_table_is_of_this_recipe(tmp_path: Path) -> None:
    """The model of all images is in the table by the name that its identity has today."""
    kept = json.loads((ROOT / "weights" / "emoji_1k" / "manifest.json").read_text())["identity"]
    today = {**kept, "recipe": Recipe("configs/experiment/emoji_1k.yaml", tmp_path, train.main).identity()}
    names = set(pq.read_table(RESULTS / "retrains.parquet", columns=["retrain"]).column("retrain").to_pylist())
    assert identity_hash(today) in names


@pytest.mark.usefixtures("in_checkout")
def test_the_methods_of_the_evaluation_have_the_identities_of_their_committed_runs() -> None:
    config = yaml.safe_load(EVALUATION.read_text())
    files = [(EVALUATION.parent / file).resolve() for file in config["methods"]]
    methods = load_methods(files, config["settings"])
    kept = {folder.name: folder / "manifest.json" for folder in (RESULTS / "judge").iterdir() if folder.is_dir()}
    compared = [name for name in methods if name in kept and kept[name].exists()]
    assert len(compared) >= 8
    for name in compared:
        expected = json.loads(kept[name].read_text())["identity"]["attributor"]
        assert json.loads(json.dumps(methods[name].identity())) == expected, name
