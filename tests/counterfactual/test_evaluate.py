"""Counterfactual evaluation on a tiny recipe: nothing is trained twice or lost, and numbers are as by hand."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import evaluate
import train
from tests.support.processes import exit_status_of
from tests.support.retrains import SOURCE, Retraining
from tests.support.tiny import one_process, training_config
from wherefrom.attributors import PixelSimilarity, Query, Scores
from wherefrom.counterfactual.effect_table import as_table
from wherefrom.counterfactual.evaluate import evaluate_counterfactual
from wherefrom.counterfactual.measurements import MeasurementTable
from wherefrom.counterfactual.protocol import Protocol
from wherefrom.counterfactual.query_panel import Panel
from wherefrom.counterfactual.random_curve import random_equivalent, random_removal_curve
from wherefrom.counterfactual.removal_plan import plan_evaluation
from wherefrom.counterfactual.retraining import RetrainedModels, RetrainingJob
from wherefrom.counterfactual.sweep import Sweep
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import QuerySource, generate
from wherefrom.runtime import keyed_random

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
]
COUNT = 40
REVERSED = QuerySource(prompts=SOURCE.prompts[::-1], sampling_steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all share images, latents and frozen parts."""
    return tmp_path_factory.mktemp("counterfactual")


@pytest.fixture(scope="module")
def recipe_file(folder: Path) -> Path:
    """A recipe of six steps."""
    return training_config(folder, "recipe", steps=6, count=COUNT)


@pytest.fixture(scope="module")
def retraining(recipe_file: Path, folder: Path) -> Retraining:
    return Retraining(recipe_file, folder / "store")


@pytest.fixture(scope="module")
def base(retraining: Retraining) -> DiffusionModel:
    return retraining.models.model(RetrainingJob())


@pytest.fixture(scope="module")
def panel(base: DiffusionModel) -> Panel:
    queries = generate(
        base, prompts=SOURCE.prompts, seed=SOURCE.seed, shape=(4, 4, 4), sampling_steps=SOURCE.sampling_steps
    )
    return Panel(queries, base, SOURCE, timesteps=10)


def test_a_model_is_trained_once_and_as_the_command_line_trains_it(
    retraining: Retraining, base: DiffusionModel, folder: Path, recipe_file: Path
) -> None:
    again = retraining.models.model(RetrainingJob())
    assert again.fingerprint() == base.fingerprint()
    assert retraining.trained.count(RetrainingJob()) == 1
    options = ["--data.init_args.seed", "0", "--seed_everything", "0"]
    train.main(["fit", "-c", str(recipe_file), *options, "--model.init_args.save_to", str(folder / "by hand")])
    assert load_model(str(folder / "by hand")).fingerprint() == base.fingerprint()


def test_what_decides_the_weights_names_them(retraining: Retraining) -> None:
    name, ids = retraining.models.name, retraining.models.ids
    assert name(RetrainingJob(ids[:2])) == name(RetrainingJob(ids[1::-1])), (
        "the order of what is left out does not matter"
    )
    names = {
        name(RetrainingJob()),
        name(RetrainingJob(seed=1)),
        name(RetrainingJob(ids[:2])),
        name(RetrainingJob(ids[:3])),
    }
    recipe, same = {**retraining.models.recipe, "model": {}}, retraining.models
    other = RetrainedModels(retraining.store, recipe, ids, same.fingerprint, same.train)
    assert len({*names, other.name(RetrainingJob())}) == 5
    with pytest.raises(ValueError, match="1 ids to leave out are not in the training set, such as 'nobody'"):
        name(RetrainingJob(("nobody",)))
    with pytest.raises(ValueError, match="named twice"):
        name(RetrainingJob((ids[0], ids[0])))


def test_leaving_nothing_out_changes_nothing_and_another_seed_does(
    recipe_file: Path, retraining: Retraining, panel: Panel, tmp_path: Path
) -> None:
    table = MeasurementTable(tmp_path / "table.parquet")
    same = retraining.measure(RetrainingJob(), panel, table)
    fresh = Retraining(recipe_file, tmp_path / "store")
    again = fresh.measure(RetrainingJob(), panel, MeasurementTable(tmp_path / "other.parquet"))
    assert len(fresh.trained) == 1
    other = retraining.measure(RetrainingJob(seed=1), panel, table)
    for query, measured in same.items():
        assert again[query].loss - measured.loss == 0.0
        assert np.array_equal(again[query].losses, measured.losses)
        assert measured.mse < 1e-5, "the model draws the query again"
        assert abs(other[query].loss - measured.loss) > 1e-4
        assert other[query].mse > 1e-5


def test_a_measurement_is_the_mean_of_single_losses(base: DiffusionModel, panel: Panel) -> None:
    measured = panel.measure(base)
    query = panel.queries[1]
    assert base.encoder is not None
    assert query.latent is not None
    conditioning, losses = base.encoder.text.encode([query.prompt]), []
    for index, timestep in enumerate(range(0, 1000, 100)):
        keys = keyed_random.combine(
            keyed_random.hash_texts([query.id]), keyed_random.combine(201, 0, 0, 0, timestep, 0)
        )
        noise = keyed_random.normal(keys, query.latent.shape, torch.float32)
        loss = base.losses(query.latent[None], conditioning, torch.tensor([timestep]), noise)
        assert measured[query.id].losses[index] == pytest.approx(float(loss), rel=1e-3), "kept in half precision"
        losses.append(float(loss))
    assert measured[query.id].loss == pytest.approx(float(np.mean(losses)), rel=1e-5)


def test_the_table_outlives_the_weights(
    recipe_file: Path, retraining: Retraining, panel: Panel, tmp_path: Path
) -> None:
    table = MeasurementTable(tmp_path / "table.parquet")
    job = RetrainingJob((retraining.models.ids[0],))
    result = retraining.measure(job, panel, table)
    gone = Retraining(recipe_file, tmp_path / "empty store")
    again = gone.measure(job, panel, table)
    assert gone.trained == []
    for query, measured in result.items():
        assert np.array_equal(again[query].losses, measured.losses)
        assert (again[query].loss, again[query].mse) == (measured.loss, measured.mse)
        assert np.isnan(again[query].similarity)
    known = table.read(panel.name)
    assert list(known) == [gone.models.name(job)]
    assert known[gone.models.name(job)].seconds > 0
    assert table.read("another panel") == {}
    other = Panel(panel.queries[::-1], retraining.models.model(RetrainingJob()), REVERSED, timesteps=10)
    assert other.name == panel.name, "the order of the queries does not matter"
    assert Panel(panel.queries, retraining.models.model(RetrainingJob()), SOURCE, timesteps=5).name != panel.name


def test_an_image_file_cannot_be_drawn_again(base: DiffusionModel, panel: Panel) -> None:
    with pytest.raises(ValueError, match="A panel's queries are drawn from prompts"):
        Panel(panel.queries[:1], base, SOURCE)


METHODS = {"pixel": {"class_path": "PixelSimilarity"}}
PROTOCOL = {"ks": [2], "query_groups": [2], "seeds": [0, 1], "random": 1, "timesteps": 10}


def experiment_file(folder: Path, recipe_file: Path, name: str, store: str, **settings: Any) -> Path:
    for method, content in METHODS.items():
        (folder / f"{method}.yaml").write_text(json.dumps(content))
    config = {
        "recipe": str(recipe_file),
        "data": json.loads(recipe_file.read_text())["data"],
        "methods": [str(folder / f"{method}.yaml") for method in METHODS],
        "queries": {"prompts": SOURCE.prompts, "sampling_steps": SOURCE.sampling_steps},
        "protocol": PROTOCOL,
        "output": str(folder / name),
        "store": str(folder / store),
        **settings,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))
    return path


def evaluate_until_killed(config: Path) -> None:
    """The command, whose process is killed when the second model is measured and before it is said so."""
    add, added = MeasurementTable.add, []

    def add_and_die(self: MeasurementTable, *arguments: Any, **keywords: Any) -> None:
        add(self, *arguments, **keywords)
        added.append(arguments)
        if len(added) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    MeasurementTable.add = add_and_die  # type: ignore[method-assign]
    evaluate.main(["counterfactual", "-c", str(config)])


def test_the_command_line_evaluates_and_goes_on_after_a_kill(recipe_file: Path, folder: Path) -> None:
    config = experiment_file(folder, recipe_file, "killed", "killed store")
    table = folder / "killed" / "retrains.parquet"
    assert exit_status_of(evaluate_until_killed, config) == -signal.SIGKILL
    measured = len(pq.read_table(table))
    before = {path: path.stat().st_mtime_ns for path in retrained(folder / "killed store")}
    assert not (folder / "killed" / "counterfactual.json").exists()
    evaluate.main(["counterfactual", "-c", str(config)])
    assert 0 < measured < len(pq.read_table(table)), "it was killed while there were models to measure"
    assert 0 < len(before) < len(retrained(folder / "killed store")), "and models to train"
    assert all(path.stat().st_mtime_ns == written for path, written in before.items()), "trained again"
    whole = experiment_file(folder, recipe_file, "whole", "whole store")
    evaluate.main(["counterfactual", "-c", str(whole)])
    collected, expected = (
        json.loads((folder / name / "counterfactual.json").read_text()) for name in ("killed", "whole")
    )
    for result in (collected, expected):
        assert result.pop("costs")["pixel"]["seconds"] > 0, "the one thing that no two runs share"
    assert collected == expected
    page = (folder / "whole" / "counterfactual.html").read_text()
    assert all(prompt in page for prompt in SOURCE.prompts)
    assert page.count("<td><img") == 2 * 3, "before, and without what pixel and chance named"
    rows = {(row["method"], row["k"]): row for row in expected["rows"]}
    assert set(rows) == {("pixel", 2), ("random", 2), ("seed-variance baseline", 0)}
    assert len(rows["pixel", 2]["loss"]["matched"]) == 2
    assert rows["pixel", 2]["removed"] == rows["random", 2]["removed"] > 1
    assert rows["pixel", 2]["loss"]["mismatched"] == [None, None], "there is one query group only"
    assert all(value > 0 for value in rows["seed-variance baseline", 0]["loss"]["matched"])


def retrained(store: Path) -> list[Path]:
    return sorted((store / "retrain").glob("*[0-9a-f]/manifest.json"))


def test_the_command_line_trains_on_random_subsets(recipe_file: Path, folder: Path) -> None:
    random_subsets = {"count": 4, "repeated": 3, "further_seeds": [1]}
    config = experiment_file(folder, recipe_file, "subsets", "store", timesteps=10, random_subsets=random_subsets)
    content = json.loads(config.read_text())
    del content["protocol"]
    config.write_text(json.dumps(content))
    evaluate.main(["lds", "-c", str(config)])
    result = json.loads((folder / "subsets" / "lds.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["pixel", "another seed"]
    assert all(-1 <= row["low"] <= row["mean"] <= row["high"] <= 1 and row["count"] == 2 for row in result["rows"])
    assert all(
        np.mean(row["values"]) == pytest.approx(row["mean"]) and len(row["values"]) == 2 for row in result["rows"]
    )
    manifests = [json.loads(path.read_text()) for path in retrained(folder / "store")]
    trained = [each["identity"] for each in manifests if each["identity"]["excluded_count"] == COUNT // 2]
    assert sorted(identity["seed"] for identity in trained) == [0, 0, 0, 0, 1, 1, 1]
    assert len({identity["excluded"] for identity in trained}) == 4


def test_deviations_are_logged_while_a_model_is_trained_again(
    recipe_file: Path, retraining: Retraining, base: DiffusionModel, panel: Panel, tmp_path: Path
) -> None:
    pipeline = retraining.store.path("retrain", retraining.models.identity(RetrainingJob())) / "pipeline"
    callback = {
        "class_path": "callbacks.SampleDeviation",
        "init_args": {
            "reference": str(pipeline),
            "queries": {"prompts": SOURCE.prompts, "sampling_steps": SOURCE.sampling_steps},
            "timesteps": 10,
        },
    }
    out = tmp_path / "retrained"
    options = ["--data.init_args.seed", "1", "--seed_everything", "1", "--trainer.callbacks", json.dumps([callback])]
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    options += ["--trainer.logger", json.dumps(logger), "--model.init_args.save_to", str(out)]
    train.main(["fit", "-c", str(recipe_file), *options])
    (log,) = tmp_path.rglob("metrics.csv")
    with log.open() as stream:
        logged = next(row for row in csv.DictReader(stream) if row.get("deviation/loss"))
    before, after = panel.measure(base), panel.measure(load_model(str(out)))
    change = np.mean([after[query].loss - measured.loss for query, measured in before.items()])
    assert float(logged["deviation/loss"]) == pytest.approx(change, rel=0.05), "the saved weights are rounded"
    assert float(logged["deviation/mse"]) == pytest.approx(np.mean([each.mse for each in after.values()]), rel=0.05)


def test_random_equivalents_come_from_the_curve_of_models(retraining: Retraining, panel: Panel, tmp_path: Path) -> None:
    scores = [pixel_scores(retraining, query) for query in panel.queries]
    sweep = Sweep(retraining.models, panel=panel, table=MeasurementTable(tmp_path / "table.parquet"))
    protocol = Protocol(ks=[2], query_groups=[2], random=0, random_removal_curve=[4, 30], random_removal_samples=2)
    (row,) = evaluate_counterfactual(tmp_path, rankings={"pixel": scores}, sweep=sweep, protocol=protocol)
    before, points = sweep.measure([RetrainingJob()])[RetrainingJob()], []
    for rung in random_removal_curve([4, 30], 2, retraining.models.ids):
        after = sweep.measure([RetrainingJob(rung.ids)])[RetrainingJob(rung.ids)]
        points.append(np.mean([after[query].loss - result.loss for query, result in before.items()]))
    expected = random_equivalent([4, 30], [points[:2], points[2:]], float(row.loss.matched.mean()))
    assert row.random_equivalent == pytest.approx(expected)
    assert "random images |" in as_table([row]).splitlines()[0]
    small, large = (set(random_removal_curve([count], 1, retraining.models.ids)[0].ids) for count in (4, 30))
    assert len(small) == 4
    assert small < large
    with pytest.raises(ValueError, match="has points between 1 and one less; given 40"):
        random_removal_curve([40], 1, retraining.models.ids)


def pixel_scores(retraining: Retraining, query: Query) -> Scores:
    method = PixelSimilarity()
    method.fit(retraining.data, None, retraining.store, one_process())
    (result,) = method.score([query])
    return result


def test_protocols_that_make_no_sense_are_refused() -> None:
    for settings in (
        {"ks": []},
        {"ks": [0]},
        {"query_groups": [0]},
        {"query_groups": []},
        {"seeds": []},
        {"random": -1},
    ):
        with pytest.raises(ValueError, match="ks, query_groups and seeds need positive numbers"):
            Protocol(**settings)
    with pytest.raises(ValueError, match=r"one for each of ks \[1, 2, 3\]; given \[4, 5\]"):
        Protocol(ks=[1, 2, 3], query_groups=[4, 5])
    assert Protocol(ks=[1, 2], query_groups=[4, 5]).stages() == [(1, 4), (2, 5)]
    assert Protocol(ks=[1, 2], query_groups=[4]).stages() == [(1, 4), (2, 4)]


def test_names_of_the_tables_own_rows_are_refused() -> None:
    for name in ("random", "seed-variance baseline", "all images", "another seed"):
        with pytest.raises(ValueError, match=f"A method is called '{name}'"):
            plan_evaluation({name: {"query": ["a", "b"]}}, Protocol(ks=[1]), ["a", "b"])


def test_a_method_that_is_added_changes_no_removal_of_the_others() -> None:
    random = np.random.default_rng(0)
    ids = [f"image {index}" for index in range(COUNT)]
    rankings = {
        method: {f"query {query}": random.permutation(ids).tolist() for query in range(6)} for method in ("a", "b", "c")
    }
    protocol = Protocol(ks=[1, 2], query_groups=[3, 2])
    alone = plan_evaluation({"a": rankings["a"]}, protocol, ids)
    together = plan_evaluation(rankings, protocol, ids)
    assert [removal for removal in together if removal.method in ("a", "random")] == alone
    for k in (1, 2):
        groups = [[r.queries for r in together if (r.method, r.k) == (method, k)] for method in rankings]
        assert groups[0] == groups[1] == groups[2]
