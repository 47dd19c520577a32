"""The judge on a tiny recipe: nothing is trained twice, nothing finished is lost, and the numbers are a hand's own."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
import train
from datamodules import ImageFolder
from lightning_modules.launch import runs
from lightning_modules.launch.recipe import Recipe
from tests.support.tiny import LENGTH, one_process, text_folder, training_config
from wherefrom.attributors import PixelSimilarity, Query, Scores
from wherefrom.counterfactual.datamodeling_experiment import Halves
from wherefrom.counterfactual.evaluate import as_table, judge, plan
from wherefrom.counterfactual.measurements import ByQuery, Measurements
from wherefrom.counterfactual.protocol import Protocol
from wherefrom.counterfactual.removal import random_equivalent, random_ladder
from wherefrom.counterfactual.retraining import Panel, Retrain, Retrains
from wherefrom.counterfactual.sweep import Sweep as Sweeps
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.encoders import LatentEncoder
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import QuerySource, generate
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
]
ROOT = Path(__file__).parents[2]
COUNT = 40
SOURCE = QuerySource(prompts=["red square", "blue circle"], sampling_steps=2)
REVERSED = QuerySource(prompts=SOURCE.prompts[::-1], sampling_steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all share images, latents and frozen parts."""
    return tmp_path_factory.mktemp("judge")


@pytest.fixture(scope="module")
def recipe_file(folder: Path) -> Path:
    """A recipe of six steps."""
    return training_config(folder, "recipe", steps=6, count=COUNT)


class Sweep:
    """Retrains of the recipe in a store of their own, and what they trained."""

    def __init__(self, recipe_file: Path, store: Path) -> None:
        pipeline = recipe_file.parent / "pipeline"
        encoder = LatentEncoder(str(pipeline / "vae"), str(text_folder(pipeline)), LENGTH)
        module = ImageFolder(str(recipe_file.parent / "pictures"), encoder=encoder, store=str(store))
        module.prepare_data()
        module.setup()
        self.data = runs.training_data_of(module)
        recipe, self.trained = Recipe(recipe_file, store, train.main), []
        assert self.data.latents is not None

        def train_one(retrain: Retrain, place: Path) -> None:
            self.trained.append(retrain)
            recipe.train(retrain, place)

        self.store = Store(store)
        latents = self.data.latents
        self.retrains = Retrains(self.store, recipe.identity(), latents.ids, latents.fingerprint, train_one)

    def measure(self, retrain: Retrain, panel: Panel, table: Measurements) -> ByQuery:
        return Sweeps(self.retrains, panel=panel, table=table).measure([retrain])[retrain]


@pytest.fixture(scope="module")
def sweep(recipe_file: Path, folder: Path) -> Sweep:
    return Sweep(recipe_file, folder / "store")


@pytest.fixture(scope="module")
def base(sweep: Sweep) -> DiffusionModel:
    return sweep.retrains.model(Retrain())


@pytest.fixture(scope="module")
def panel(base: DiffusionModel) -> Panel:
    queries = generate(
        base, prompts=SOURCE.prompts, seed=SOURCE.seed, shape=(4, 4, 4), sampling_steps=SOURCE.sampling_steps
    )
    return Panel(queries, base, SOURCE, timesteps=10)


def test_a_model_is_trained_once_and_as_the_command_line_trains_it(
    sweep: Sweep, base: DiffusionModel, folder: Path, recipe_file: Path
) -> None:
    again = sweep.retrains.model(Retrain())
    assert again.fingerprint() == base.fingerprint()
    assert sweep.trained.count(Retrain()) == 1
    options = ["--data.init_args.seed", "0", "--seed_everything", "0"]
    train.main(["fit", "-c", str(recipe_file), *options, "--model.init_args.save_to", str(folder / "by hand")])
    assert load_model(str(folder / "by hand")).fingerprint() == base.fingerprint()


def test_what_decides_the_weights_names_them(sweep: Sweep) -> None:
    name, ids = sweep.retrains.name, sweep.retrains.ids
    assert name(Retrain(ids[:2])) == name(Retrain(ids[1::-1])), "the order of what is left out does not matter"
    names = {name(Retrain()), name(Retrain(seed=1)), name(Retrain(ids[:2])), name(Retrain(ids[:3]))}
    recipe, same = {**sweep.retrains.recipe, "model": {}}, sweep.retrains
    other = Retrains(sweep.store, recipe, ids, same.fingerprint, same.train)
    assert len({*names, other.name(Retrain())}) == 5
    with pytest.raises(ValueError, match="1 ids to leave out are not in the training set, such as 'nobody'"):
        name(Retrain(("nobody",)))
    with pytest.raises(ValueError, match="named twice"):
        name(Retrain((ids[0], ids[0])))


def test_leaving_nothing_out_changes_nothing_and_another_seed_does(
    recipe_file: Path, sweep: Sweep, panel: Panel, tmp_path: Path
) -> None:
    table = Measurements(tmp_path / "table.parquet")
    same = sweep.measure(Retrain(), panel, table)
    fresh = Sweep(recipe_file, tmp_path / "store")
    again = fresh.measure(Retrain(), panel, Measurements(tmp_path / "other.parquet"))
    assert len(fresh.trained) == 1
    other = sweep.measure(Retrain(seed=1), panel, table)
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
    states, losses = base.encoder.text.encode([query.prompt]), []
    for index, timestep in enumerate(range(0, 1000, 100)):
        keys = keyed_random.combine(
            keyed_random.hash_texts([query.id]), keyed_random.combine(201, 0, 0, 0, timestep, 0)
        )
        noise = keyed_random.normal(keys, query.latent.shape, torch.float32)
        loss = base.losses(query.latent[None], states, torch.tensor([timestep]), noise)
        assert measured[query.id].losses[index] == pytest.approx(float(loss), rel=1e-3), "kept in half precision"
        losses.append(float(loss))
    assert measured[query.id].loss == pytest.approx(float(np.mean(losses)), rel=1e-5)


def test_the_table_outlives_the_weights(recipe_file: Path, sweep: Sweep, panel: Panel, tmp_path: Path) -> None:
    table = Measurements(tmp_path / "table.parquet")
    retrain = Retrain((sweep.retrains.ids[0],))
    result = sweep.measure(retrain, panel, table)
    gone = Sweep(recipe_file, tmp_path / "empty store")
    again = gone.measure(retrain, panel, table)
    assert gone.trained == []
    for query, measured in result.items():
        assert np.array_equal(again[query].losses, measured.losses)
        assert (again[query].loss, again[query].mse) == (measured.loss, measured.mse)
        assert np.isnan(again[query].similarity)
    known = table.read(panel.name)
    assert list(known) == [gone.retrains.name(retrain)]
    assert known[gone.retrains.name(retrain)].seconds > 0
    assert table.read("another panel") == {}
    other = Panel(panel.queries[::-1], sweep.retrains.model(Retrain()), REVERSED, timesteps=10)
    assert other.name == panel.name, "the order of the queries does not matter"
    assert Panel(panel.queries, sweep.retrains.model(Retrain()), SOURCE, timesteps=5).name != panel.name


def test_a_image_file_cannot_be_drawn_again(base: DiffusionModel, panel: Panel) -> None:
    with pytest.raises(ValueError, match="A panel's queries are drawn from prompts"):
        Panel(panel.queries[:1], base, SOURCE)


METHODS = {"pixel": {"class_path": "PixelSimilarity"}}
PROTOCOL = {"ks": [2], "pools": [2], "seeds": [0, 1], "random": 1, "timesteps": 10}


def judge_config(folder: Path, recipe_file: Path, name: str, store: str, **settings: Any) -> Path:
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


def test_the_command_line_judges_and_goes_on_after_a_kill(recipe_file: Path, folder: Path) -> None:
    config = judge_config(folder, recipe_file, "killed", "killed store")
    table = folder / "killed" / "retrains.parquet"
    command = [sys.executable, str(ROOT / "evaluate.py"), "counterfactual", "-c", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not table.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed while there was work left"
    before = {path: path.stat().st_mtime_ns for path in retrained(folder / "killed store")}
    evaluate.main(["counterfactual", "-c", str(config)])
    assert before
    assert all(path.stat().st_mtime_ns == written for path, written in before.items()), "trained again"
    whole = judge_config(folder, recipe_file, "whole", "whole store")
    evaluate.main(["counterfactual", "-c", str(whole)])
    collected, expected = (
        json.loads((folder / name / "counterfactual.json").read_text()) for name in ("killed", "whole")
    )
    for result in (collected, expected):
        assert result.pop("costs")["pixel"]["seconds"] > 0, "the one thing that no two runs share"
    assert collected == expected
    page = (folder / "whole" / "judge.html").read_text()
    assert all(prompt in page for prompt in SOURCE.prompts)
    assert page.count("<td><img") == 2 * 3, "before, and without what pixel and chance named"
    rows = {(row["method"], row["k"]): row for row in expected["rows"]}
    assert set(rows) == {("pixel", 2), ("random", 2), ("another seed", 0)}
    assert len(rows["pixel", 2]["loss"]["own"]) == 2
    assert rows["pixel", 2]["removed"] == rows["random", 2]["removed"] > 1
    assert rows["pixel", 2]["loss"]["others"] == [None, None], "there is one pool only"
    assert all(value > 0 for value in rows["another seed", 0]["loss"]["own"])


def retrained(store: Path) -> list[Path]:
    return sorted((store / "retrain").glob("*[0-9a-f]/manifest.json"))


def test_the_command_line_trains_on_halves(recipe_file: Path, folder: Path) -> None:
    halves = {"count": 4, "repeated": 3, "further_seeds": [1]}
    config = judge_config(folder, recipe_file, "halves", "store", timesteps=10, halves=halves)
    content = json.loads(config.read_text())
    del content["protocol"]
    config.write_text(json.dumps(content))
    evaluate.main(["lds", "-c", str(config)])
    result = json.loads((folder / "halves" / "lds.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["pixel", "another seed"]
    assert all(-1 <= row["low"] <= row["mean"] <= row["high"] <= 1 and row["count"] == 2 for row in result["rows"])
    assert all(
        np.mean(row["values"]) == pytest.approx(row["mean"]) and len(row["values"]) == 2 for row in result["rows"]
    )
    manifests = [json.loads(path.read_text()) for path in retrained(folder / "store")]
    trained = [each["identity"] for each in manifests if each["identity"]["excluded_count"] == COUNT // 2]
    assert sorted(identity["seed"] for identity in trained) == [0, 0, 0, 0, 1, 1, 1]
    assert len({identity["excluded"] for identity in trained}) == 4


def test_halves_are_random_and_of_one_size() -> None:
    ids = [f"image {index}" for index in range(41)]
    subsets = Halves(count=200).subsets(ids)
    assert (subsets.sum(axis=1) == 20).all()
    assert abs(subsets.mean(axis=0) - 20 / 41).max() < 0.15
    assert np.array_equal(Halves(count=5, repeated=0).subsets(ids[::-1])[:, ::-1], subsets[:5]), (
        "the order of the ids is not used"
    )
    assert not np.array_equal(Halves(count=5, seed=1, repeated=0).subsets(ids), subsets[:5])
    for settings in ({"count": 2, "repeated": 0}, {"share": 1.0}, {"repeated": 33}):
        with pytest.raises(ValueError, match="needs at least 3 subsets"):
            Halves(**settings)


def test_deviations_are_logged_while_a_model_is_trained_again(
    recipe_file: Path, sweep: Sweep, base: DiffusionModel, panel: Panel, tmp_path: Path
) -> None:
    pipeline = sweep.store.path("retrain", sweep.retrains.identity(Retrain())) / "pipeline"
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


def test_random_equivalents_come_from_a_ladder_of_models(sweep: Sweep, panel: Panel, tmp_path: Path) -> None:
    scores = [pixel_scores(sweep, query) for query in panel.queries]
    sweeping = Sweeps(sweep.retrains, panel=panel, table=Measurements(tmp_path / "table.parquet"))
    protocol = Protocol(ks=[2], pools=[2], random=0, ladder=[4, 30], ladder_draws=2)
    (row,) = judge(tmp_path, rankings={"pixel": scores}, sweep=sweeping, protocol=protocol)
    before, rungs = sweeping.measure([Retrain()])[Retrain()], []
    for rung in random_ladder([4, 30], 2, sweep.retrains.ids):
        after = sweeping.measure([Retrain(rung.ids)])[Retrain(rung.ids)]
        rungs.append(np.mean([after[query].loss - result.loss for query, result in before.items()]))
    expected = random_equivalent([4, 30], [rungs[:2], rungs[2:]], float(row.loss.own.mean()))
    assert row.equivalent == pytest.approx(expected)
    assert "at random |" in as_table([row]).splitlines()[0]
    small, large = (set(random_ladder([count], 1, sweep.retrains.ids)[0].ids) for count in (4, 30))
    assert len(small) == 4
    assert small < large
    with pytest.raises(ValueError, match="has rungs between 1 and one less; given 40"):
        random_ladder([40], 1, sweep.retrains.ids)


def pixel_scores(sweep: Sweep, query: Query) -> Scores:
    method = PixelSimilarity()
    method.fit(sweep.data, None, sweep.store, one_process())
    (result,) = method.score([query])
    return result


def test_protocols_that_make_no_sense_are_refused() -> None:
    for settings in ({"ks": []}, {"ks": [0]}, {"pools": [0]}, {"pools": []}, {"seeds": []}, {"random": -1}):
        with pytest.raises(ValueError, match="ks, pools and seeds need positive numbers"):
            Protocol(**settings)
    with pytest.raises(ValueError, match=r"one for each of ks \[1, 2, 3\]; given \[4, 5\]"):
        Protocol(ks=[1, 2, 3], pools=[4, 5])
    assert Protocol(ks=[1, 2], pools=[4, 5]).stages() == [(1, 4), (2, 5)]
    assert Protocol(ks=[1, 2], pools=[4]).stages() == [(1, 4), (2, 4)]


def test_names_of_the_judges_own_rows_are_refused() -> None:
    for name in ("random", "another seed"):
        with pytest.raises(ValueError, match=f"A method is called '{name}'"):
            plan({name: {"query": ["a", "b"]}}, Protocol(ks=[1]), ["a", "b"])


def test_a_method_that_is_added_changes_no_removal_of_the_others() -> None:
    random = np.random.default_rng(0)
    ids = [f"image {index}" for index in range(COUNT)]
    rankings = {
        method: {f"query {query}": random.permutation(ids).tolist() for query in range(6)} for method in ("a", "b", "c")
    }
    protocol = Protocol(ks=[1, 2], pools=[3, 2])
    alone = plan({"a": rankings["a"]}, protocol, ids)
    together = plan(rankings, protocol, ids)
    assert [removal for removal in together if removal.method in ("a", "random")] == alone
    for k in (1, 2):
        pools = [[r.queries for r in together if (r.method, r.k) == (method, k)] for method in rankings]
        assert pools[0] == pools[1] == pools[2]
