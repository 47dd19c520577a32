"""Every image of a folder is ranked unless the user names a null, by each interface; training holds some out, said."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import evaluate
import train
from datamodules import LAION, ImageFolder
from datamodules.images import ImageDataModule
from lightning_modules.launch.training_speed import sizes_of
from tests.support.folders import make
from tests.support.tiny import attribution_config, tiny_pipeline, training_config
from tests.support.user_world import UserWorld, user_world
from tests.support.worlds import make_shards
from wherefrom.api import AttributionOptions, attribute_images
from wherefrom.cli import main
from wherefrom.data.webdataset import ShardOptions

pytestmark = pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty:UserWarning")
COUNT = 100
PIXEL = {"class_path": "PixelSimilarity"}
WORDS_OF_A_NULL = "never trained on"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> UserWorld:
    """A model, 100 images without splits, and the 18th of them, asked about."""
    made = user_world(tmp_path_factory.mktemp("withheld"))
    shutil.rmtree(made.images)
    make(made.images, COUNT)
    shutil.copy(made.images / "17.png", made.generated)
    return made


@pytest.fixture
def null_folder(tmp_path: Path) -> Path:
    """Ten other images under names that the training images have too."""
    folder = tmp_path / "others"
    make(folder, 10)
    for number in range(10):
        pixels = np.random.default_rng(500 + number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def ranked(run: Path) -> list[str]:
    table = pq.read_table(run / "ranking.parquet").to_pydict()
    return [str(name) for name in table["image"]]


def with_splits(folder: Path, images: Path) -> Path:
    """The world's images with 80 for training, 15 for validation and 5 for testing."""
    shutil.copytree(images, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["split"] = "train" if number < 80 else "validation" if number < 95 else "test"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_api_and_command_rank_all_images_and_have_no_null(
    world: UserWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", str(tmp_path / "store")]
    main(["attribute", *world.words, *world.query, "--method", "pixel", "--output", str(tmp_path / "run"), *store])
    assert "100 images are ranked, and there is no null" in capsys.readouterr().err
    options = AttributionOptions(store=tmp_path / "store", progress=False)
    (scores,) = attribute_images(world.model, world.images, [(world.generated, "a red square")], "pixel", options)
    assert sorted(scores.ids) == sorted(f"{number}.png" for number in range(COUNT))
    assert scores.top(1)[0][0] == "17.png"
    assert len(scores.null) == 0
    assert ranked(tmp_path / "run") == [name for name, _ in scores.top(COUNT)]
    assert "p_value" not in scores.table().columns
    assert "p_value" not in pq.read_table(tmp_path / "run" / "ranking.parquet").column_names
    scores.save_report(tmp_path / "api.html")
    for page in (tmp_path / "run" / "report.html", tmp_path / "api.html"):
        assert WORDS_OF_A_NULL not in page.read_text()


def test_the_laboratory_ranks_all_images_by_its_own_experiment(world: UserWorld, tmp_path: Path) -> None:
    experiment = Path(__file__).parents[2] / "configs" / "experiment" / "image_folder.yaml"
    attributor = tmp_path / "pixel.yaml"
    attributor.write_text(json.dumps(PIXEL))
    given = {
        "model": world.model,
        "data.init_args.folder": world.images,
        "data.init_args.options.size": 8,
        "attributor": attributor,
        "queries.images": json.dumps([{"file": str(world.generated), "prompt": "a red square"}]),
        "output": tmp_path / "run",
        "store": tmp_path / "store",
        "trainer.accelerator": "cpu",
    }
    # The tiny model encodes its images as they are asked for: the method itself needs none.
    evaluate.main(["attribute", "-c", str(experiment), *(w for k, v in given.items() for w in (f"--{k}", str(v)))])
    assert len(ranked(tmp_path / "run")) == COUNT
    assert ranked(tmp_path / "run")[0] == "17.png"
    assert WORDS_OF_A_NULL not in (tmp_path / "run" / "report.html").read_text()


def test_shards_are_ranked_whole(tmp_path: Path) -> None:
    keys = [key for several in make_shards(tmp_path / "shards") for key in several]
    data = {"class_path": "LAION", "init_args": {"folder": str(tmp_path / "shards"), "options": {"size": 8}}}
    evaluate.main(["attribute", "-c", str(attribution_config(tmp_path, data=data, attributor=PIXEL, count=4))])
    assert sorted(ranked(tmp_path / "run")) == sorted(keys)
    assert WORDS_OF_A_NULL not in (tmp_path / "run" / "report.html").read_text()


def test_training_of_the_same_folder_holds_its_share_out_and_says_it(
    world: UserWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(world.images, tmp_path / "pictures")
    tiny_pipeline(tmp_path / "pipeline")
    caplog.set_level(logging.INFO, "lightning.pytorch")
    cli = train.main(["fit", "-c", str(training_config(tmp_path, steps=5))])
    data = cli.datamodule
    held_out = len(data.validation_images)
    assert held_out == 3, "by the hashes of their ids, as ever"
    assert len(data.train_images) == COUNT - held_out
    (line,) = [each.getMessage() for each in caplog.records if "out for validation" in each.getMessage()]
    assert line.startswith("holding 5% (3 of 100 images) out for validation; set validation_share")


def modules(world: UserWorld, folder: Path, **given: Any) -> list[ImageDataModule]:
    shards = folder / "shards"
    if not shards.exists():
        make_shards(shards)
    store = str(folder / "store")
    options = ShardOptions(size=8)
    return [
        ImageFolder(str(world.images), store=store, **given),
        LAION(str(shards), options=options, store=store, **given),
    ]


def test_data_modules_know_whether_they_train(world: UserWorld, tmp_path: Path) -> None:
    for module in modules(world, tmp_path):
        train_images, held_out = module.load()
        assert not len(held_out)
        census = module.census()
        assert (census.training, census.held_out) == (len(train_images), 0)
        module.trains = True
        kept, share = module.load()
        assert 0 < len(share) < 0.2 * len(train_images)
        assert sorted(kept.ids + share.ids) == sorted(train_images.ids)
        sizes, _ = sizes_of(module)
        assert (sizes.training, sizes.held_out) == (len(train_images) - sizes.held_out, round(0.05 * len(train_images)))
    for module in modules(world, tmp_path, validation_share=0.3):
        count = len(module.load()[1])
        assert count > 0, "asked for"
        module.trains = True
        assert len(module.load()[1]) == count
    with pytest.raises(ValueError, match=r"validation_share is a share from 0 to below 1.*given 5"):
        ImageFolder(str(world.images), validation_share=5)


def test_a_named_validation_split_is_the_null_and_both_are_said(
    world: UserWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str], null_folder: Path
) -> None:
    folder = with_splits(tmp_path / "splits", world.images)
    words = ["--model", str(world.model), "--images", str(folder), *world.query, "--method", "pixel"]
    words += ["--store", str(tmp_path / "store")]

    def run(name: str, *more: str) -> tuple[int, int, str, str]:
        main(["attribute", *words, "--output", str(tmp_path / name), *more])
        table = pq.read_table(tmp_path / name / "ranking.parquet")
        page = (tmp_path / name / "report.html").read_text()
        said = capsys.readouterr().err
        count = "".join(filter(str.isdigit, page.partition("Images never trained on (the null)")[2][:40]))
        return table.num_rows, int(count or 0), said, page

    rows, null, said, _ = run("default")
    assert (rows, null) == (80, 15)
    assert "split 'validation' (15); --null none --split all ranks them too" in said
    assert "left out: split 'test' (5), neither ranked nor the null; name it in --split to rank it too" in said
    rows, null, said, page = run("all", "--null", "none", "--split", "all")
    assert (rows, null) == (100, 0)
    assert WORDS_OF_A_NULL not in page
    assert run("several", "--split", "training", "--split", "test", "--null", "val")[:2] == (85, 15)
    assert run("folder", "--null", str(null_folder))[:2] == (80, 10)
    # A file says the same, where the bare word null is YAML's for nothing.
    (tmp_path / "request.yaml").write_text("null: none\nsplit: [train, validation]\n")
    assert run("file", "-c", str(tmp_path / "request.yaml"))[:2] == (95, 0)
    kept = yaml.safe_load((tmp_path / "folder" / "wherefrom.yaml").read_text())
    assert kept["null"] == str(null_folder)
    # The page of a run is written once more from its own record.
    before = (tmp_path / "folder" / "report.html").read_text()
    main(["report", str(tmp_path / "folder"), "--store", str(tmp_path / "store")])
    assert (tmp_path / "folder" / "report.html").read_text() == before
    # The laboratory's data module is asked by the same words.
    data = {
        "class_path": "ImageFolder",
        "init_args": {"folder": str(folder), "split": "all", "held_out": str(null_folder)},
    }
    config = attribution_config(tmp_path, "lab", data=data, attributor=PIXEL, model=str(world.model))
    evaluate.main(["attribute", "-c", str(config)])
    assert len(ranked(tmp_path / "lab")) == 100
    assert "never trained on (the null)</bdi></dt><dd><bdi>10<" in (tmp_path / "lab" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "holdout"], r"--split: the images have no splits, so 'holdout' names none of them"),
        (["--null", "no-such-folder"], r"--null: 'no-such-folder' is neither a split .* or --null none\."),
    ],
)
def test_a_wrong_choice_is_refused_before_the_model_is_loaded(
    world: UserWorld, tmp_path: Path, words: list[str], message: str
) -> None:
    given = ["attribute", "--model", str(tmp_path), "--images", str(world.images), *world.query, *words]
    with pytest.raises(ValueError, match=message):
        main([*given, "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_the_laboratory_refuses_a_wrong_choice_in_its_own_words(world: UserWorld, tmp_path: Path) -> None:
    folder = with_splits(tmp_path / "splits", world.images)
    for given, message in (
        ({"split": "holdout"}, r"data\.init_args\.split: no image has the split 'holdout'"),
        ({"split": "all", "held_out": "val"}, r"data\.init_args\.held_out: images of the split 'validation' cannot be"),
        ({"options": {"caption": "prompts"}}, r"no column 'prompts'.*data\.init_args\.options\.caption"),
    ):
        data = {"class_path": "ImageFolder", "init_args": {"folder": str(folder), **given}}
        config = attribution_config(tmp_path, "lab", data=data, attributor=PIXEL, model=str(world.model))
        with pytest.raises(ValueError, match=message):
            evaluate.main(["attribute", "-c", str(config)])
    assert not (tmp_path / "store" / "image_folder").exists(), "before anything is decoded"


@pytest.mark.parametrize("interface", ["command", "api"])
def test_remedies_name_what_an_interface_has(world: UserWorld, tmp_path: Path, interface: str) -> None:
    folder = tmp_path / "nested"
    make(folder, 2, extra={"a": 1})
    store = tmp_path / "store"

    def ask() -> object:
        if interface == "command":
            words = ["--model", str(world.model), "--images", str(folder), *world.query, "--store", str(store)]
            return main(["attribute", *words, "--output", str(tmp_path / "run")])
        options = AttributionOptions(store=store, progress=False)
        return attribute_images(world.model, folder, [(world.generated, "a red square")], "pixel", options)

    with pytest.raises(ValueError, match=r"'extra' holds a dict, not text\. Write it as text, or take the column out"):
        ask()


def test_a_query_and_training_images_among_the_null_are_warned_of(
    world: UserWorld, tmp_path: Path, null_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(world.generated, null_folder / "3.png")
    options = AttributionOptions(store=tmp_path / "store", progress=False, null=null_folder)
    (scores,) = attribute_images(world.model, world.images, [(world.generated, "a red square")], "pixel", options)
    assert (len(scores.ids), len(scores.null)) == (100, 10)
    asked, both = (record.getMessage() for record in caplog.records if "null" in record.getMessage())
    assert asked.startswith("1 of 1 queries are among the null themselves")
    assert "AttributionOptions(null='none') measures without a null" in asked
    assert both.startswith("1 of the 10 images of the null are also ranked: 'null/3.png'")


def test_a_recipe_and_a_ranking_are_about_the_same_images(world: UserWorld, tmp_path: Path) -> None:
    shutil.copytree(world.images, tmp_path / "pictures")
    tiny_pipeline(tmp_path / "pipeline")
    recipe = training_config(tmp_path, "recipe", steps=5)
    data = json.loads(recipe.read_text())["data"]
    method = tmp_path / "pixel.yaml"
    method.write_text(json.dumps(PIXEL))
    config = {
        "recipe": str(recipe),
        "data": data,
        "methods": [str(method)],
        "queries": {"prompts": ["red square"], "sampling_steps": 2},
        "random_subsets": {"count": 3, "repeated": 0},
        "timesteps": 2,
        "output": str(tmp_path / "lds"),
        "store": str(tmp_path / "store"),
    }
    path = tmp_path / "lds.yaml"
    path.write_text(json.dumps(config))
    evaluate.main(["lds", "-c", str(path)])
    assert len(ranked(tmp_path / "lds" / "pixel")) == 97, "what the recipe holds out is not ranked"
    for given, message in (
        ({"validation_share": 0.0}, r"trains on 97 images and 100 are ranked.*3 are ranked only"),
        ({"exclude": ["5.png"]}, r"trains on 97 images and 96 are ranked.*1 are trained on only \('5\.png'\)"),
    ):
        other = {
            **config,
            "data": {**data, "init_args": {**data["init_args"], **given}},
            "output": str(tmp_path / "no"),
        }
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=message):
            evaluate.main(["lds", "-c", str(path)])
