"""What wandb holds of a run, kept offline: configuration, numbers, ranked images, artifacts and their lineage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import wandb

import evaluate
import train
from tests.support.tiny import attribution_config, one_process, tiny_folder, training_config
from wherefrom.attributors import PixelSimilarity, Query, TrainingData
from wherefrom.commands.tracking import Tracking, artifact_of, ranked, run_is_open, track
from wherefrom.data.image_folder import build_image_folder
from wherefrom.runtime.artifacts import Store, identity_hash, read_manifest, write_manifest


class Kept:
    """What wandb was asked to keep."""

    def __init__(self) -> None:
        self.artifacts: list[wandb.Artifact] = []
        self.logged: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Notes what real, offline runs are given, and gives it to them."""
    result = Kept()
    log, artifact, finish = wandb.Run.log, wandb.Run.log_artifact, wandb.Run.finish

    def noted_log(run: wandb.Run, data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        result.logged |= data
        log(run, data, *args, **kwargs)

    def noted_artifact(run: wandb.Run, given: wandb.Artifact, *args: Any, **kwargs: Any) -> wandb.Artifact:
        if not given.name.startswith("run-"):  # a table's, which wandb makes itself
            result.artifacts.append(given)
        return artifact(run, given, *args, **kwargs)

    def noted_finish(run: wandb.Run, *args: Any, **kwargs: Any) -> None:
        result.config, result.summary = dict(run.config), dict(run.summary)
        finish(run, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", noted_log)
    monkeypatch.setattr(wandb.Run, "log_artifact", noted_artifact)
    monkeypatch.setattr(wandb.Run, "finish", noted_finish)
    return result


def test_an_attribution_is_tracked_with_its_curvature(tmp_path: Path, kept: Kept) -> None:
    config = attribution_config(tmp_path)
    evaluate.main(["attribute", "-c", str(config), "--wandb.project", "tests", "--wandb.top", "3"])
    assert kept.config["command"] == "attribute"
    assert kept.config["queries"]["prompts"] == ["a big red square"]
    table = kept.logged["ranked"]
    first = pq.read_table(tmp_path / "run" / "ranking.parquet").slice(0, 3).to_pydict()
    assert [row[4] for row in table.data] == first["image"]
    assert [row[5] for row in table.data] == first["score"]
    assert kept.summary["mean seconds"] > 0
    names = {artifact.type: artifact for artifact in kept.artifacts}
    output = kept.artifacts[-1]
    manifest = read_manifest(tmp_path / "run")
    assert output.name == f"attribute-{identity_hash(manifest['identity'])}"
    assert output.metadata["identity"]["model"] == manifest["identity"]["model"]
    assert set(output.metadata["inputs"]) == {artifact.name for artifact in kept.artifacts[:-1]}
    fisher = next(each for each in names if "fisher" in each)
    (folder,) = (tmp_path / "store" / fisher).glob("*[0-9a-f]")
    assert names[fisher].name == f"{fisher}-{folder.name}"
    (entry, *_) = names[fisher].manifest.entries.values()
    assert str(entry.ref).startswith(folder.resolve().as_uri()), "named, not uploaded"


def test_nothing_is_tracked_without_a_project(tmp_path: Path, kept: Kept) -> None:
    track(Tracking(), job="attribute", folder=tmp_path, config={})
    assert not kept.artifacts
    assert not list(tmp_path.iterdir())


def test_results_become_tables_and_numbers(tmp_path: Path, kept: Kept) -> None:
    rows = [
        {"method": "pixel", "k": 5, "loss": {"own": [0.5, None]}},
        {"method": "random", "k": 5, "loss": {"own": [0.1, 0.2]}},
    ]
    (tmp_path / "counterfactual.json").write_text(json.dumps({"rows": rows}))
    track(Tracking("tests"), job="counterfactual", folder=tmp_path, config={"path": tmp_path})
    table = kept.logged["counterfactual"]
    assert table.columns == ["method", "k", "loss.own.0", "loss.own.1"]
    assert table.data == [["pixel", 5, 0.5, None], ["random", 5, 0.1, 0.2]]
    assert kept.summary["counterfactual/random/loss.own.1"] == 0.2
    assert "counterfactual/pixel/loss.own.1" not in kept.summary


def test_the_table_shows_both_images(tmp_path: Path) -> None:
    images = build_image_folder(Store(tmp_path / "store"), tiny_folder(tmp_path / "pictures")).where("split", "train")
    method = PixelSimilarity()
    method.fit(TrainingData(images), None, Store(tmp_path / "store"), one_process())
    results = list(method.score([Query("q", "a circle", np.array(images.pixels[2]))]))
    table = ranked(results, images, 2)
    assert table.data[0][3:5] == [1, images.ids[2]]
    assert table.data[0][7:] == [images.captions[2][0], "CC0-1.0"]
    np.testing.assert_array_equal(np.asarray(table.data[0][6].image), images.pixels[2])


def test_files_are_uploaded_on_request(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"a": 1})
    (tmp_path / "weights").write_text("w")
    uploaded = artifact_of(tmp_path, "ranker", ["teacher-1"], upload=True)
    assert set(uploaded.manifest.entries) == {"manifest.json", "weights"}
    assert all(entry.ref is None for entry in uploaded.manifest.entries.values())
    assert uploaded.name == f"ranker-{identity_hash({'a': 1})}"
    assert uploaded.metadata["inputs"] == ["teacher-1"]


def test_a_training_logs_the_model_that_it_saved(tmp_path: Path, kept: Kept) -> None:
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"offline": True, "save_dir": str(tmp_path), "project": "tests"},
    }
    options = {
        "trainer.logger": json.dumps([logger]),
        "trainer.callbacks": json.dumps([{"class_path": "LogArtifacts"}]),
        "model.init_args.save_to": str(tmp_path / "model"),
        "model.init_args.init_from": str(tmp_path / "pipeline" / "unet"),
    }
    config = training_config(tmp_path, steps=8)
    train.main(["fit", "-c", str(config), *(word for name, value in options.items() for word in (f"--{name}", value))])
    wandb.finish()
    start, saved = kept.artifacts
    assert (start.type, saved.type) == ("start", "LatentDiffusion")
    assert saved.metadata["inputs"] == [start.name]
    assert "model_index.json" in saved.manifest.entries


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: Any) -> Any:
        raise wandb.errors.CommError(f"project {settings['project']!r} is not there.")

    monkeypatch.setattr(wandb, "init", refuse)


@pytest.mark.usefixtures("refusing")
def test_a_wrong_project_fails_before_data_are_read_and_models_loaded(tmp_path: Path) -> None:
    data = {"class_path": "ImageFolder", "init_args": {"folder": str(tmp_path / "no such folder")}}
    config = attribution_config(tmp_path, data=data, model=str(tmp_path / "no such model"))
    with pytest.raises(ValueError, match=r"wandb: project 'wrong' is not there.*--wandb\.project and --wandb\.entity"):
        evaluate.main(["attribute", "-c", str(config), "--wandb.project", "wrong"])
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "store").exists()

    logger = {"class_path": "WandbLogger", "init_args": {"project": "wrong", "save_dir": str(tmp_path)}}
    recipe = training_config(tmp_path, "recipe")
    words = ["--trainer.logger", json.dumps(logger), "--data.init_args.encoder.init_args.vae", str(tmp_path / "none")]
    with pytest.raises(ValueError, match=r"wandb: project 'wrong' is not there.*the logger's project"):
        train.main(["fit", "-c", str(recipe), *words])
    assert not (tmp_path / "store").exists()


def test_a_command_that_fails_leaves_a_failed_run_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int | None] = []
    finish = wandb.Run.finish

    def noted(run: wandb.Run, exit_code: int | None = None, **settings: Any) -> None:
        codes.append(exit_code)
        finish(run, exit_code=exit_code, **settings)

    monkeypatch.setattr(wandb.Run, "finish", noted)
    config = attribution_config(tmp_path, model=str(tmp_path / "no such model"))
    with pytest.raises((ValueError, OSError), match="no such model"):
        evaluate.main(["attribute", "-c", str(config), "--wandb.project", "tests"])
    assert codes == [1]
    assert not run_is_open()
    assert not (tmp_path / "run").exists(), "else it would be taken by a run that never was"


@pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_trainings_inside_of_a_command_are_runs_of_their_own(tmp_path: Path, kept: Kept) -> None:
    recipe = training_config(tmp_path, "recipe", steps=5)
    content = json.loads(recipe.read_text())
    offline = {"offline": True, "save_dir": str(tmp_path / "trainings"), "project": "tests"}
    content["trainer"]["logger"].append({"class_path": "WandbLogger", "init_args": offline})
    recipe.write_text(json.dumps(content))
    (tmp_path / "pixel.yaml").write_text(json.dumps({"class_path": "PixelSimilarity"}))
    config = {
        "recipe": str(recipe),
        "data": content["data"],
        "methods": [str(tmp_path / "pixel.yaml")],
        "queries": {"prompts": ["red square"], "sampling_steps": 2},
        "random_subsets": {"count": 3, "repeated": 0},
        "timesteps": 2,
        "output": str(tmp_path / "lds"),
        "store": str(tmp_path / "store"),
        "wandb": {"project": "tests"},
    }
    (tmp_path / "lds.yaml").write_text(json.dumps(config))
    evaluate.main(["lds", "-c", str(tmp_path / "lds.yaml")])
    assert kept.config["command"] == "lds", "the command's own run is the last to end"
    assert len(list((tmp_path / "lds").glob("wandb/offline-run-*"))) == 1
    assert len(list((tmp_path / "trainings").glob("wandb/offline-run-*"))) == 4
    assert not run_is_open()
