"""Sweep: what fails does not stop the rest, published weights are used, and Ray's workers do the same work."""

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
from tests.support.retrains import SOURCE, Retraining
from tests.support.tiny import training_config
from wherefrom.counterfactual.measurements import MeasurementTable, ModelMeasurements
from wherefrom.counterfactual.query_panel import Panel
from wherefrom.counterfactual.retraining import RetrainedModels, RetrainingJob
from wherefrom.counterfactual.sweep import Sweep, TrainAndMeasure
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
def retraining(recipe_file: Path, folder: Path) -> Retraining:
    return Retraining(recipe_file, folder / "store")


@pytest.fixture(scope="module")
def panel(retraining: Retraining) -> Panel:
    base = retraining.models.model(RetrainingJob())
    return Panel(
        generate(base, prompts=SOURCE.prompts, seed=SOURCE.seed, shape=(4, 4, 4), sampling_steps=SOURCE.sampling_steps),
        base,
        SOURCE,
        10,
    )


def without(retraining: Retraining, *positions: int, seed: int = 0) -> RetrainingJob:
    return RetrainingJob(tuple(retraining.models.ids[each] for each in positions), seed)


def test_a_model_that_fails_does_not_stop_the_others(retraining: Retraining, panel: Panel, tmp_path: Path) -> None:
    wanted = [without(retraining, 0), without(retraining, 1), without(retraining, 2)]
    said: list[str] = []
    sweep = Sweep(
        retraining.models,
        panel=panel,
        table=MeasurementTable(tmp_path / "table.parquet"),
        engine=in_process,
        log=said.append,
    )
    train = retraining.models.train

    def fail(job: RetrainingJob, place: Path) -> None:
        if job == wanted[1]:
            raise ValueError("The training loss is nan at step 3.")
        train(job, place)

    retraining.models.train = fail
    try:
        with pytest.raises(ValueError, match=r"1 of 3 models could not be trained.*training loss is nan"):
            sweep.measure(wanted)
    finally:
        retraining.models.train = train
    assert said[0].startswith("3 models, 0 of them measured before; 3 to train: time is known after the first, ")
    assert "MiB of weights" in said[0]
    assert [line.split(":")[0] for line in said[1:]] == [
        "model 1 of 3 (seed 0, without 1 images)",
        "FAILED",
        "model 3 of 3 (seed 0, without 1 images)",
    ]
    count = len(retraining.trained)
    result = sweep.measure([*wanted, wanted[0]])
    assert retraining.trained[count:] == [wanted[1]], "only what failed is trained again"
    assert set(result) == set(wanted)
    assert "3 models, 2 of them measured before; 1 to train: about " in said[4]


def test_a_run_finds_what_models_drew_before_it(
    retraining: Retraining, panel: Panel, recipe_file: Path, tmp_path: Path
) -> None:
    table, wanted = MeasurementTable(tmp_path / "table.parquet"), without(retraining, 3)
    Sweep(retraining.models, panel=panel, table=table).measure([wanted])
    strip = f"{retraining.models.name(wanted)}.png"
    kept = retraining.store.root / "drawn" / panel.name / strip

    def brought(models: RetrainedModels, folder: str, said: list[str]) -> Path:
        Sweep(models, panel=panel, table=table, log=said.append, images=tmp_path / folder).measure([wanted])
        return tmp_path / folder / strip

    said: list[str] = []
    first = brought(retraining.models, "first", said).read_bytes()
    assert first == kept.read_bytes()
    kept.unlink()
    assert brought(retraining.models, "again", said).read_bytes() == first, "drawn again by the same weights"
    assert said[1:] == [said[0], "drawing again by models that were measured before: 1"]
    assert not brought(Retraining(recipe_file, tmp_path / "empty store").models, "gone", said).exists()


def test_published_weights_are_used_instead_of_training(
    retraining: Retraining, recipe_file: Path, tmp_path: Path
) -> None:
    base = retraining.models.model(RetrainingJob())
    pipeline = retraining.store.path("retrain", retraining.models.identity(RetrainingJob())) / "pipeline"
    copied = shutil.copytree(pipeline, tmp_path / "published")
    fresh = Retraining(recipe_file, tmp_path / "store")
    with pytest.raises(ArtifactMismatchError, match="seed: on disk 0, asked for 1"):
        fresh.models.publish(RetrainingJob(seed=1), copied)
    fresh.models.publish(RetrainingJob(), copied)
    assert fresh.models.model(RetrainingJob()).fingerprint() == base.fingerprint()
    assert fresh.trained == []
    (copied / "manifest.json").unlink()
    with pytest.raises(ValueError, match="nothing says which training left it there"):
        fresh.models.publish(RetrainingJob(), copied)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    path.write_text("losses")
    with pytest.raises(ValueError, match="is not a table of measurements"):
        MeasurementTable(path).read("panel")
    pq.write_table(pa.table({"panel": ["panel"], "loss": [1.0]}), path)
    with pytest.raises(ValueError, match="is not a table of measurements"):
        MeasurementTable(path).read("panel")


def test_callbacks_and_loggers_of_the_recipe_stay(recipe_file: Path, tmp_path: Path) -> None:
    config = json.loads(recipe_file.read_text())
    config["trainer"]["callbacks"].append({"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"})
    offline = {"save_dir": str(tmp_path), "offline": True}
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": offline}
    config["trainer"]["logger"].append(wandb)
    changed = recipe_file.with_name("with callbacks.yaml")
    changed.write_text(json.dumps(config))
    recipe = Retraining(changed, tmp_path / "store")
    recipe.models.model(RetrainingJob())
    (log,) = (tmp_path / "store").rglob("metrics.csv")
    recipe.models.model(without(recipe, 0))
    assert "lr-AdamW" in log.read_text().splitlines()[0]
    assert not list((tmp_path / "store" / "retrain").rglob("*.ckpt"))
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2, "each training is a run of its own"
    plain = Retraining(recipe_file, tmp_path / "store")
    assert plain.models.name(RetrainingJob()) == recipe.models.name(RetrainingJob()), "they do not decide the weights"


def test_a_retraining_on_two_devices_ends_like_one_on_one(
    retraining: Retraining, recipe_file: Path, tmp_path: Path
) -> None:
    config = json.loads(recipe_file.read_text())
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    two = recipe_file.with_name("two devices.yaml")
    two.write_text(json.dumps(config))
    ddp = Retraining(two, tmp_path / "store")
    assert ddp.models.name(RetrainingJob()) == retraining.models.name(RetrainingJob())
    result, wanted = (each.models.model(RetrainingJob()).denoiser.state_dict() for each in (ddp, retraining))
    for name, weight in wanted.items():
        np.testing.assert_allclose(result[name].numpy(), weight.numpy(), atol=2e-3, err_msg=name)


def test_a_retraining_that_dies_in_its_own_process_is_reported(recipe_file: Path, tmp_path: Path) -> None:
    config = json.loads(recipe_file.read_text())
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    config["data"]["init_args"]["batch_size"] = 7  # which two processes cannot share equally
    two = recipe_file.with_name("odd batch.yaml")
    two.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="ended with exit status 1"):
        Retraining(two, tmp_path / "store").models.model(RetrainingJob())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray")
def test_rays_workers_measure_what_one_process_does_though_one_is_killed(
    ray_cluster: None, recipe_file: Path, folder: Path, panel: Panel, tmp_path: Path
) -> None:
    alone = Retraining(recipe_file, folder / "store")
    shared = Retraining(recipe_file, tmp_path / "store")
    shared.models.train = Killed(recipe_file, tmp_path)
    wanted = [without(alone, index, seed=seed) for index in range(2) for seed in range(2)]
    engine = Workers("ray", count=2).get()
    result = Sweep(shared.models, panel=panel, table=MeasurementTable(tmp_path / "ray.parquet"), engine=engine).measure(
        wanted
    )
    expected = Sweep(alone.models, panel=panel, table=MeasurementTable(tmp_path / "one.parquet")).measure(wanted)
    processes = (tmp_path / "processes").read_text().split()
    assert processes.count("killed") == 1
    trained = [each for each in processes if each != "killed"]
    assert len(trained) == 5, "one model twice, for it was interrupted"
    assert 2 <= len(set(trained)) <= 3, "workers live on from model to model"
    assert str(os.getpid()) not in trained
    for job in wanted:
        for query, measured in expected[job].items():
            assert result[job][query].loss == measured.loss
            assert np.array_equal(result[job][query].losses, measured.losses)


class Killed:
    """Trains as the recipe does, but the first worker that comes to its third model dies after it has begun."""

    def __init__(self, recipe_file: Path, folder: Path) -> None:
        self.recipe_file, self.folder = recipe_file, folder

    def __call__(self, job: RetrainingJob, place: Path) -> None:
        with (self.folder / "processes").open("a") as log:
            log.write(f"{os.getpid()}\n")
        if job.exclude and job.seed == 1 and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            with (self.folder / "processes").open("a") as log:
                log.write("killed\n")
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        Recipe(self.recipe_file, self.folder / "store", train.main).train(job, place)


def test_workers_that_make_no_sense_are_refused() -> None:
    for settings in ({"count": 0}, {"cpus": -1}, {"gpus": -1}):
        with pytest.raises(ValueError, match="workers need a positive count"):
            Workers("ray", **settings)
    assert Workers().get() is in_process
    assert list(Workers("ray").get()(TrainAndMeasure.__new__(TrainAndMeasure), [])) == []


def test_a_model_that_is_trained_is_only_measured(retraining: Retraining, panel: Panel) -> None:
    work, count = TrainAndMeasure(retraining.models, panel), len(retraining.trained)
    ((job, result),) = in_process(work, [RetrainingJob()])
    assert job == RetrainingJob()
    assert isinstance(result, ModelMeasurements)
    assert len(retraining.trained) == max(count, 1)
