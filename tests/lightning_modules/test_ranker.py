"""Training of a ranker through the command line: it learns, resumes, records, and refuses what is wrong."""

from __future__ import annotations

import csv
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning import Trainer
from lightning.pytorch.cli import LightningCLI

import train
from callbacks import RetrievalMetrics
from datamodules import TeacherRankings
from lightning_modules import LearningToRank
from tests.support.planted import planted_teacher
from tests.support.tiny import training_config
from wherefrom.distillation.pair_blocks import BlockSampler
from wherefrom.distillation.ranker import Ranker, load_ranker, save_ranker
from wherefrom.distillation.teacher_set import write_teacher_set
from wherefrom.metrics.retrieval import MeanAveragePrecision, RecallAtK
from wherefrom.runtime.artifacts import read_manifest

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
    # A few steps do not turn the scale, nor spread the predictions; what is said then has a test of its own.
    pytest.mark.filterwarnings("ignore:The ranker's (scale|predictions):UserWarning"),
]
SIZES = {"inputs": 6, "width": 16, "hidden": 1, "outputs": 8, "dropout": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teacher sets: neighbours of 24 queries, and whole rankings of 300."""
    root = tmp_path_factory.mktemp("ranker")
    write_teacher_set(root / "near", planted_teacher(queries=24, images=50, scored=15))
    write_teacher_set(root / "whole", planted_teacher(queries=300, images=80))
    return root


def config(folder: Path, name: str, teacher: str, steps: int, **data: Any) -> Path:
    """An experiment file; all it makes goes below `folder / name`."""
    run = folder / name
    checkpoints = {"dirpath": str(run), "filename": "{step}", "every_n_train_steps": 4, "save_top_k": -1}
    content = {
        "seed_everything": 5,
        "model": {
            "class_path": "LearningToRank",
            "init_args": {
                "ranker": {"class_path": "wherefrom.distillation.ranker.Ranker", "init_args": SIZES},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
                "save_to": str(run / "ranker"),
            },
        },
        "data": {
            "class_path": "TeacherRankings",
            "init_args": {
                "folder": str(folder / teacher),
                "features": ["first", "second"],
                "block_queries": 8,
                "block_images": 20,
                **data,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(run),
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(run)}}],
            "callbacks": [
                {"class_path": "RetrievalMetrics", "init_args": {"k": [3, 8]}},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints},
            ],
        },
    }
    run.mkdir(exist_ok=True)
    (run / "experiment.yaml").write_text(yaml.safe_dump(content))
    return run / "experiment.yaml"


def fit(folder: Path, name: str, *options: str, teacher: str = "near", steps: int = 30, **data: Any) -> LightningCLI:
    return train.main(["fit", "-c", str(config(folder, name, teacher, steps, **data)), *options])


def rows_of(folder: Path) -> list[dict[str, str]]:
    (metrics,) = folder.rglob("metrics.csv")
    return list(csv.DictReader(metrics.read_text().splitlines()))


@pytest.fixture(scope="module")
def run(folder: Path) -> LightningCLI:
    return fit(folder, "run")


def test_a_run_leaves_a_ranker_metrics_and_a_configuration(run: LightningCLI, folder: Path) -> None:
    saved, features = load_ranker(folder / "run" / "ranker")
    assert features == ["first", "second"]
    for name, value in run.model.ranker.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value)
    training = read_manifest(folder / "run" / "ranker")["training"]
    assert training["teacher"] == {"teacher": "planted", "seed": 0}
    assert (training["seed"], training["seed_everything"], training["steps"]) == (0, "5", 30)
    assert (training["queries"], training["candidates"]) == (22, 15)
    assert training["scale"] == float(saved.scale.detach())
    rows = rows_of(folder / "run")
    assert len([row for row in rows if row["train/loss"]]) == 30
    last = [row for row in rows if row["val/map_3"]][-1]
    for name in ("map_3", "map_8", "map_8_error", "recall_3", "recall_8", "flatness", "spread", "scale", "loss"):
        assert np.isfinite(float(last[f"val/{name}"])), name
    assert training["metrics"]["val/map_8"] == pytest.approx(float(last["val/map_8"]), rel=1e-5)
    (saved_config,) = (folder / "run").rglob("config.yaml")
    assert yaml.safe_load(saved_config.read_text())["data"]["init_args"]["outside"] == 0.1


def test_metrics_are_of_the_validation_queries_and_the_whole_set(run: LightningCLI, folder: Path) -> None:
    data: TeacherRankings = run.datamodule
    run.trainer.validate(run.model, data, verbose=False)
    held_out, result = data.validation_set, run.trainer.callback_metrics
    features = held_out.concatenated(["first", "second"])
    ranker = load_ranker(folder / "run" / "ranker")[0]
    with torch.no_grad():
        cosines = ranker.embed(torch.tensor(features.queries)) @ ranker.embed(torch.tensor(features.training)).T
    assert cosines.shape == (2, 50)
    for k in (3, 8):
        right = torch.zeros(2, 50, dtype=torch.bool)
        right[torch.arange(2)[:, None], torch.tensor(held_out.rows[:, :k]).long()] = True
        for name, metric in (("map", MeanAveragePrecision()), ("recall", RecallAtK(k))):
            metric.update(cosines, right)
            assert float(result[f"val/{name}_{k}"]) == pytest.approx(float(metric.compute()["mean"]), rel=1e-6)
    logits = ranker.logits(cosines).gather(1, torch.tensor(held_out.rows).long())
    ranks = (torch.arange(15) / 15).expand(2, 15)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, ranks)
    assert float(result["val/loss"]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_resumed_run_ends_bit_identical(run: LightningCLI, folder: Path) -> None:
    """From the middle of an epoch, dropout included."""
    assert 8 % len(run.datamodule.train_dataloader()), "an epoch ends where the checkpoint was written"
    resumed = fit(folder, "resumed", "--ckpt_path", str(folder / "run" / "step=8.ckpt"))
    assert resumed.trainer.global_step == 30
    for name, value in run.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    other = fit(folder, "other", "--data.init_args.seed", "1").model.state_dict()
    assert not torch.equal(other["ranker.mlp.output_layer.weight"], value_of(run))


def value_of(run: LightningCLI) -> torch.Tensor:
    return run.model.state_dict()["ranker.mlp.output_layer.weight"]


def test_dropout_belongs_to_the_block(folder: Path) -> None:
    data = TeacherRankings(str(folder / "near"), features=["first", "second"])
    data.setup()
    block = BlockSampler(data.device_pairs, 0, 4, 9).block(0)
    module = LearningToRank(Ranker(**SIZES)).train()
    before = torch.get_rng_state()
    losses = module.losses(block)
    assert losses.shape == (4, 9)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(module.losses(block), losses)
    assert not torch.equal(module.losses(block._replace(key=block.key + 1)), losses)
    assert torch.equal(module.eval().losses(block), module.losses(block._replace(key=0)))


def test_it_learns_what_is_planted(folder: Path) -> None:
    """Held-out queries, beside the cosine of the raw features."""
    learned = fit(
        folder,
        "learned",
        "--trainer.check_val_every_n_epoch",
        "24",  # nine blocks an epoch
        "--model.init_args.ranker.init_args.width",
        "32",
        teacher="whole",
        steps=216,
        block_queries=30,
        block_images=80,
    )
    result = learned.trainer.callback_metrics
    held_out = learned.datamodule.validation_set
    features = held_out.concatenated(["first", "second"])
    queries, images = (
        torch.nn.functional.normalize(torch.tensor(side)) for side in (features.queries, features.training)
    )
    right = torch.zeros(30, 80, dtype=torch.bool).scatter_(1, torch.tensor(held_out.rows[:, :8]).long(), True)
    untuned = MeanAveragePrecision()
    untuned.update(queries @ images.T, right)
    assert float(result["val/map_8"]) > 0.65
    assert float(result["val/map_8"]) > 1.5 * float(untuned.compute()["mean"])
    assert float(result["val/scale"]) < 0


@pytest.mark.parametrize("loss", ["SquaredError", "Ordinal", "Regression"])
def test_every_loss_is_chosen_in_the_configuration(folder: Path, loss: str) -> None:
    option = ["--model.init_args.loss", f"wherefrom.distillation.losses.{loss}", "--trainer.max_steps", "60"]
    trained = fit(folder, loss, *option)
    assert type(trained.model.loss).__name__ == loss
    losses = [float(row["train/loss"]) for row in rows_of(folder / loss) if row["train/loss"]]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    optimized = {id(value) for group in trained.trainer.optimizers[0].param_groups for value in group["params"]}
    assert all(id(parameter) in optimized for parameter in trained.model.loss.parameters())
    assert read_manifest(folder / loss / "ranker")["training"]["loss"] == loss


def test_a_run_can_start_from_another_ranker(run: LightningCLI, folder: Path) -> None:
    start = ["--model.init_args.init_from", str(folder / "run" / "ranker")]
    still = ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.init_args.lr", "0.0"]
    still += ["--model.init_args.scale_lr", "null"]
    started = fit(folder, "started", *start, *still, steps=1)
    for name, value in run.model.ranker.state_dict().items():
        assert torch.equal(started.model.ranker.state_dict()[name], value)
    with pytest.raises(ValueError, match=r"init_from .* holds a ranker of sizes .*'width': 16"):
        fit(folder, "wider", *start, "--model.init_args.ranker.init_args.width", "17")
    with pytest.raises(ValueError, match=r"takes the features \['first', 'second'\]; the data module gives"):
        fit(folder, "turned", *start, "--data.init_args.features", "[second, first]")


def test_scale_and_bias_have_a_rate_of_their_own() -> None:
    def rates(**settings: Any) -> list[tuple[float, int]]:
        module = LearningToRank(Ranker(**SIZES), scale=-7.0, bias=2.0, **settings)
        assert (module.ranker.scale.item(), module.ranker.bias.item()) == (-7.0, 2.0)
        optimizer = module.configure_optimizers()
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))
        return [(group["lr"], len(group["params"])) for group in optimizer.param_groups]

    assert rates(scale_lr=0.5) == [(1e-3, 4), (0.5, 2)]
    assert rates(scale_lr=None) == [(1e-3, 4), (1e-3, 2)]


def test_early_stopping_watches_the_logged_metric(folder: Path) -> None:
    stop = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"
    settings = [f"--trainer.callbacks.{name}={value}" for name, value in (("monitor", "val/map_8"), ("mode", "max"))]
    # Nothing changes at a rate of 0, so the first validation that is no better ends the run.
    still = ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.init_args.lr", "0.0"]
    still += ["--model.init_args.scale_lr", "null"]
    stopped = fit(folder, "stopped", stop, *settings, "--trainer.callbacks.patience=1", *still)
    assert stopped.trainer.global_step == 2 * len(stopped.trainer.train_dataloader)


def test_splits_are_by_query_and_nested(folder: Path) -> None:
    def made(**settings: Any) -> TeacherRankings:
        data = TeacherRankings(str(folder / "whole"), features=["first"], **settings)
        data.setup()
        return data

    whole, fewer, fewest = made(), made(queries=20), made(queries=7, seed=0)
    assert len(whole.validation_set.queries) == 30
    assert not set(whole.validation_set.queries) & set(whole.train_set.queries)
    assert set(fewest.train_set.queries) < set(fewer.train_set.queries) < set(whole.train_set.queries)
    for other in (fewer, made(seed=1)):
        assert other.validation_set.queries == whole.validation_set.queries
    assert made(split_seed=1).validation_set.queries != whole.validation_set.queries
    assert made(queries=7, seed=1).train_set.queries != fewest.train_set.queries
    assert made(candidates=11).device_pairs.used == 11
    first = made(first=9)
    np.testing.assert_array_equal(first.device_pairs.rows, whole.device_pairs.rows[:, :9])
    assert (first.device_pairs.used, first.device_pairs.outside) == (9, 71)
    assert first.validation_pairs.used == 80  # what is measured against stays whole
    with pytest.raises(ValueError, match="scored 80 images per query; the first 81 were requested"):
        made(first=81)
    for queries in (0, 271):
        with pytest.raises(ValueError, match=f"queries is {queries}, but .*whole leaves 270 to train on"):
            made(queries=queries)
    for share in (0.0, 0.001, 1.0):
        with pytest.raises(ValueError, match=rf"validation_share {share} of the 300 queries"):
            made(validation_share=share)


def test_validation_queries_may_be_of_another_folder(folder: Path) -> None:
    teacher = planted_teacher(queries=24, images=50, scored=15)
    others = replace(teacher.of_queries([3, 5]), queries=("a", "b"))
    write_teacher_set(folder / "others", others)
    data = TeacherRankings(str(folder / "near"), features=["second"], validation_folder=str(folder / "others"))
    data.setup()
    assert data.validation_set.queries == ("a", "b")
    assert len(data.train_set.queries) == 24
    with pytest.raises(ValueError, match=r"near ranks 50 training images, .*whole 80"):
        TeacherRankings(str(folder / "whole"), features=["first"], validation_folder=str(folder / "near")).setup()


def test_features_of_another_width_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"The features first of .*near are 4 wide, .*takes 6: set .* to 4"):
        fit(folder, "narrow", "--data.init_args.features", "[first]")


def test_a_k_beyond_what_was_scored_is_refused(folder: Path) -> None:
    options = ["--trainer.callbacks", '[{"class_path": "RetrievalMetrics", "init_args": {"k": [16]}}]']
    with pytest.raises(ValueError, match="asked for k = 16, but the teacher scored 15 images a query"):
        fit(folder, "far", *options)
    for k in ([], [0, 3]):
        with pytest.raises(ValueError, match="at least one k, all positive"):
            RetrievalMetrics(k)


def test_accumulated_gradients_and_other_data_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches is 2, but each step has one block"):
        fit(folder, "accumulated", "--trainer.accumulate_grad_batches", "2")
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, default_root_dir=folder)
    with pytest.raises(ValueError, match="LearningToRank learns from TeacherRankings, not from NoneType"):
        trainer.fit(LearningToRank(Ranker(**SIZES)), [torch.zeros(1)], [torch.zeros(1)])


def test_metrics_of_another_module_are_refused(folder: Path) -> None:
    path = training_config(folder / "diffusion")
    with pytest.raises(ValueError, match="RetrievalMetrics belongs to LearningToRank, not to LatentDiffusion"):
        train.main(["fit", "-c", str(path), "--trainer.callbacks+=RetrievalMetrics", "--trainer.callbacks.k=[1]"])


def test_a_ranker_that_should_not_be_served_is_warned_of(folder: Path) -> None:
    """A scale of 1 is the start's; with a bias alone all predictions are alike."""
    ranker = Ranker(**SIZES)
    with torch.no_grad():
        ranker.scale.fill_(1e-3)
    save_ranker(folder / "flat", ranker, ["first", "second"])
    still = ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.init_args.lr", "0.0"]
    still += ["--model.init_args.scale_lr", "null"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "The ranker's")
        fit(folder, "warned", "--model.init_args.init_from", str(folder / "flat"), *still)
    said = [str(each.message) for each in caught]
    assert len(said) == 2
    assert said[0].startswith("The ranker's scale is 0.001 after training")
    assert "predictions are nearly uniform" in said[1]
    assert "ranks 0.000" in said[1]
