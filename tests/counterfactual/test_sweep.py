"""Sweeps: what fails does not stop the rest, published weights are used, and Ray's workers do the same work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import train
from lightning_modules.launch.recipe import Recipe
from tests.counterfactual.test_evaluate import SOURCE, Sweep
from tests.support.tiny import training_config
from wherefrom.counterfactual.measurements import Finished, Measurements
from wherefrom.counterfactual.retraining import Panel, Retrain, Retrains
from wherefrom.counterfactual.sweep import Sweep as Sweeps
from wherefrom.counterfactual.sweep import Work
from wherefrom.queries.sources import generate
from wherefrom.runtime.artifacts import ArtifactMismatchError
from wherefrom.runtime.executors import Workers, in_process

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def recipe_file(folder: Path) -> Path:
    return training_config(folder, "recipe", steps=6, count=40)


@pytest.fixture(scope="module")
def sweep(recipe_file: Path, folder: Path) -> Sweep:
    return Sweep(recipe_file, folder / "store")


@pytest.fixture(scope="module")
def panel(sweep: Sweep) -> Panel:
    base = sweep.retrains.model(Retrain())
    return Panel(
        generate(base, prompts=SOURCE.prompts, seed=SOURCE.seed, shape=(4, 4, 4), sampling_steps=SOURCE.sampling_steps),
        base,
        SOURCE,
        10,
    )


def without(sweep: Sweep, *positions: int, seed: int = 0) -> Retrain:
    return Retrain(tuple(sweep.retrains.ids[each] for each in positions), seed)


def test_a_model_that_fails_does_not_stop_the_others(sweep: Sweep, panel: Panel, tmp_path: Path) -> None:
    wanted = [without(sweep, 0), without(sweep, 1), without(sweep, 2)]
    said: list[str] = []
    sweeping = Sweeps(
        sweep.retrains, panel=panel, table=Measurements(tmp_path / "table.parquet"), engine=in_process, log=said.append
    )
    train = sweep.retrains.train

    def fail(retrain: Retrain, place: Path) -> None:
        if retrain == wanted[1]:
            raise ValueError("The training loss is nan at step 3.")
        train(retrain, place)

    sweep.retrains.train = fail
    try:
        with pytest.raises(ValueError, match=r"1 of 3 models could not be trained.*training loss is nan"):
            sweeping.measure(wanted)
    finally:
        sweep.retrains.train = train
    assert said[0].startswith("3 models, 0 of them measured before; 3 to train: time is known after the first, ")
    assert "MiB of weights" in said[0]
    assert [line.split(":")[0] for line in said[1:]] == [
        "model 1 of 3 (seed 0, without 1 images)",
        "FAILED",
        "model 3 of 3 (seed 0, without 1 images)",
    ]
    count = len(sweep.trained)
    result = sweeping.measure([*wanted, wanted[0]])
    assert sweep.trained[count:] == [wanted[1]], "only what failed is trained again"
    assert set(result) == set(wanted)
    assert "3 models, 2 of them measured before; 1 to train: about " in said[4]


def test_a_run_finds_what_models_drew_before_it(sweep: Sweep, panel: Panel, recipe_file: Path, tmp_path: Path) -> None:
    table, wanted = Measurements(tmp_path / "table.parquet"), without(sweep, 3)
    Sweeps(sweep.retrains, panel=panel, table=table).measure([wanted])
    strip = f"{sweep.retrains.name(wanted)}.png"
    kept = sweep.store.root / "drawn" / panel.name / strip

    def brought(retrains: Retrains, folder: str, said: list[str]) -> Path:
        Sweeps(retrains, panel=panel, table=table, log=said.append, images=tmp_path / folder).measure([wanted])
        return tmp_path / folder / strip

    said: list[str] = []
    first = brought(sweep.retrains, "first", said).read_bytes()
    assert first == kept.read_bytes()
    kept.unlink()
    assert brought(sweep.retrains, "again", said).read_bytes() == first, "drawn again by the same weights"
    assert said[1:] == [said[0], "drawing again by models that were measured before: 1"]
    assert not brought(Sweep(recipe_file, tmp_path / "empty store").retrains, "gone", said).exists()


def test_published_weights_are_used_instead_of_training(sweep: Sweep, recipe_file: Path, tmp_path: Path) -> None:
    base = sweep.retrains.model(Retrain())
    pipeline = sweep.store.path("retrain", sweep.retrains.identity(Retrain())) / "pipeline"
    copied = shutil.copytree(pipeline, tmp_path / "published")
    fresh = Sweep(recipe_file, tmp_path / "store")
    with pytest.raises(ArtifactMismatchError, match="seed: on disk 0, asked for 1"):
        fresh.retrains.publish(Retrain(seed=1), copied)
    fresh.retrains.publish(Retrain(), copied)
    assert fresh.retrains.model(Retrain()).fingerprint() == base.fingerprint()
    assert fresh.trained == []
    (copied / "manifest.json").unlink()
    with pytest.raises(ValueError, match="nothing says which training left it there"):
        fresh.retrains.publish(Retrain(), copied)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    path.write_text("losses")
    with pytest.raises(ValueError, match="is not a table of measurements"):
        Measurements(path).read("panel")
    pq.write_table(pa.table({"panel": ["panel"], "loss": [1.0]}), path)
    with pytest.raises(ValueError, match="is not a table of measurements"):
        Measurements(path).read("panel")


def test_callbacks_and_loggers_of_the_recipe_stay(recipe_file: Path, tmp_path: Path) -> None:
    config = json.loads(recipe_file.read_text())
    config["trainer"]["callbacks"].append({"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"})
    offline = {"save_dir": str(tmp_path), "offline": True}
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": offline}
    config["trainer"]["logger"].append(wandb)
    changed = recipe_file.with_name("with callbacks.yaml")
    changed.write_text(json.dumps(config))
    recipe = Sweep(changed, tmp_path / "store")
    recipe.retrains.model(Retrain())
    (log,) = (tmp_path / "store").rglob("metrics.csv")
    recipe.retrains.model(without(recipe, 0))
    assert "lr-AdamW" in log.read_text().splitlines()[0]
    assert not list((tmp_path / "store" / "retrain").rglob("*.ckpt"))
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2, "each training is a run of its own"
    plain = Sweep(recipe_file, tmp_path / "store")
    assert plain.retrains.name(Retrain()) == recipe.retrains.name(Retrain()), "they do not decide the weights"


def test_a_retraining_on_two_devices_ends_like_one_on_one(sweep: Sweep, recipe_file: Path, tmp_path: Path) -> None:
    config = json.loads(recipe_file.read_text())
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    two = recipe_file.with_name("two devices.yaml")
    two.write_text(json.dumps(config))
    ddp = Sweep(two, tmp_path / "store")
    assert ddp.retrains.name(Retrain()) == sweep.retrains.name(Retrain())
    result, wanted = (each.retrains.model(Retrain()).denoiser.state_dict() for each in (ddp, sweep))
    for name, weight in wanted.items():
        np.testing.assert_allclose(result[name].numpy(), weight.numpy(), atol=2e-3, err_msg=name)


def test_a_retraining_that_dies_in_its_own_process_is_reported(recipe_file: Path, tmp_path: Path) -> None:
    config = json.loads(recipe_file.read_text())
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    config["data"]["init_args"]["batch_size"] = 7  # which two processes cannot share equally
    two = recipe_file.with_name("odd batch.yaml")
    two.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="ended with exit status 1"):
        Sweep(two, tmp_path / "store").retrains.model(Retrain())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray")
def test_rays_workers_measure_what_one_process_does_though_one_is_killed(
    ray_cluster: None, recipe_file: Path, folder: Path, panel: Panel, tmp_path: Path
) -> None:
    alone = Sweep(recipe_file, folder / "store")
    shared = Sweep(recipe_file, tmp_path / "store")
    shared.retrains.train = Killed(recipe_file, tmp_path)
    wanted = [without(alone, index, seed=seed) for index in range(2) for seed in range(2)]
    engine = Workers("ray", count=2).get()
    result = Sweeps(shared.retrains, panel=panel, table=Measurements(tmp_path / "ray.parquet"), engine=engine).measure(
        wanted
    )
    expected = Sweeps(alone.retrains, panel=panel, table=Measurements(tmp_path / "one.parquet")).measure(wanted)
    processes = (tmp_path / "processes").read_text().split()
    assert processes.count("killed") == 1
    trained = [each for each in processes if each != "killed"]
    assert len(trained) == 5, "one model twice, for it was interrupted"
    assert 2 <= len(set(trained)) <= 3, "workers live on from model to model"
    assert str(os.getpid()) not in trained
    for retrain in wanted:
        for query, measured in expected[retrain].items():
            assert result[retrain][query].loss == measured.loss
            assert np.array_equal(result[retrain][query].losses, measured.losses)


class Killed:
    """Trains as the recipe does, but the first worker that comes to its third model dies after it has begun."""

    def __init__(self, recipe_file: Path, folder: Path) -> None:
        self.recipe_file, self.folder = recipe_file, folder

    def __call__(self, retrain: Retrain, place: Path) -> None:
        with (self.folder / "processes").open("a") as log:
            log.write(f"{os.getpid()}\n")
        if retrain.exclude and retrain.seed == 1 and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            with (self.folder / "processes").open("a") as log:
                log.write("killed\n")
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        Recipe(self.recipe_file, self.folder / "store", train.main).train(retrain, place)


def test_workers_that_make_no_sense_are_refused() -> None:
    for settings in ({"count": 0}, {"cpus": -1}, {"gpus": -1}):
        with pytest.raises(ValueError, match="workers need a positive count"):
            Workers("ray", **settings)
    assert Workers().get() is in_process
    assert list(Workers("ray").get()(Work.__new__(Work), [])) == []


def test_a_work_that_is_done_is_only_measured(sweep: Sweep, panel: Panel) -> None:
    work, count = Work(sweep.retrains, panel), len(sweep.trained)
    ((retrain, result),) = in_process(work, [Retrain()])
    assert retrain == Retrain()
    assert isinstance(result, Finished)
    assert len(sweep.trained) == max(count, 1)
