"""Folders as trainers keep them, from the words of one line to a ranking."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from datamodules import ImageFolder
from tests.support.folders import make, paint
from tests.support.user_world import UserWorld
from wherefrom.api import AttributionOptions, attribute_images
from wherefrom.cli import main
from wherefrom.data.image_folder import ImageFolderOptions

TEXTS = {"a": "a red bus", "b": "a blue cat\nanother line", "c": ""}
Maker = Callable[[Path], Path]


def texts(folder: Path, suffix: str = ".txt") -> Path:
    for seed, (name, text) in enumerate(TEXTS.items()):
        paint(folder / f"{name}.png", seed)
        (folder / f"{name}{suffix}").write_text(text)
    return folder


def kohya(folder: Path) -> Path:
    texts(folder / "10_bus", ".caption")
    paint(folder / "2_dog" / "d.png", 9)
    return folder


def toml(folder: Path) -> Path:
    kohya(folder)
    subsets = (("10_bus", 3, ""), ("2_dog", 1, 'is_reg = true\nclass_tokens = "dog"'))
    (folder / "dataset.toml").write_text(
        "[[datasets]]\nresolution = 8\n"
        + "".join(
            f"[[datasets.subsets]]\nimage_dir = {name!r}\nnum_repeats = {repeats}\n{more}\n"
            for name, repeats, more in subsets
        )
    )
    return folder / "dataset.toml"


def kohya_list(folder: Path) -> Path:
    texts(folder)
    (folder / "meta_cap.json").write_text(json.dumps({name: {"tags": "bus"} for name in TEXTS}))
    return folder / "meta_cap.json"


def json_lines(folder: Path) -> Path:
    texts(folder)
    rows = [{"image_path": f"{name}.png", "caption": text} for name, text in TEXTS.items()]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "set.jsonl"


def images_alone(folder: Path) -> Path:
    for seed, name in enumerate(TEXTS):
        paint(folder / f"{name}.png", seed)
    return folder


def only_train(folder: Path) -> Path:
    make(folder / "train", 3, "csv")
    return folder


PLAIN = {"a.png": 1, "b.png": 1, "c.png": 1}
TENS = {f"10_bus/{name}.png": 10 for name in TEXTS}


@pytest.mark.parametrize(
    ("made", "more", "layout", "repeats"),
    [
        (texts, [], "sidecar", PLAIN),
        (kohya, [], "kohya", {**TENS, "2_dog/d.png": 2}),
        (kohya, ["--layout", "sidecar"], "sidecar", {**dict.fromkeys(TENS, 1), "2_dog/d.png": 1}),
        # Nine images with their repeats, so nine regularization images.
        (toml, [], "toml", {**dict.fromkeys(TENS, 3), "2_dog/d.png": 9}),
        (kohya_list, [], "list", PLAIN),
        (json_lines, [], "list", PLAIN),
        (images_alone, ["--one-caption", ""], "images", PLAIN),
        (only_train, [], "imagefolder", {f"train/{index}.png": 1 for index in range(3)}),
    ],
)
def test_a_folder_is_ranked_in_one_line(
    world: UserWorld,
    empty: Path,
    capsys: pytest.CaptureFixture[str],
    made: Maker,
    more: list[str],
    layout: str,
    repeats: dict[str, int],
) -> None:
    images = made(Path("images"))
    words = ["--model", str(world.model), "--images", str(images), *world.query, "--method", "pixel", *more]
    main(["attribute", *words, "--output", "run"])
    table = pq.read_table("run/ranking.parquet").to_pydict()
    there = table.get("repeats", [1] * len(table["image"]))
    assert dict(zip(table["image"], map(int, there), strict=True)) == repeats
    said = capsys.readouterr().err
    assert f"as {layout}" in said
    assert ("--layout overrides" in said) is ("--layout" not in more)
    page = Path("run/report.html").read_text()
    Path("run/report.html").unlink()
    main(["report", "run"])
    assert Path("run/report.html").read_text() == page
    shutil.rmtree("run")
    # The same by a file, and from Python.
    options = {word[2:].replace("-", "_"): value for word, value in zip(more[::2], more[1::2], strict=True)}
    query = {"image": str(world.generated), "prompt": "a red square"}
    tree = {"model": str(world.model), "images": str(images), "queries": [query], "method": "pixel", **options}
    Path("run.yaml").write_text(yaml.safe_dump(tree))
    main(["attribute", "-c", "run.yaml", "--output", "run"])
    assert pq.read_table("run/ranking.parquet").to_pydict()["image"] == table["image"]
    asked = AttributionOptions(progress=False, **options)  # type: ignore[arg-type]
    (same,) = attribute_images(str(world.model), images, [(str(world.generated), "a red square")], "pixel", asked)
    assert [name for name, _ in same.top(9)] == table["image"]


def test_images_alone_are_refused_before_the_model_is_looked_for(world: UserWorld, empty: Path) -> None:
    words = ["--model", "nowhere", "--images", str(images_alone(Path("images"))), *world.query]
    with pytest.raises(ValueError, match="give it in --one-caption"):
        main(["attribute", *words])
    with pytest.raises(ValueError, match=r"give it in AttributionOptions\.one_caption"):
        attribute_images("nowhere", "images", [(str(world.generated), "")])


def test_the_budget_of_a_folder_with_caption_files(
    world: UserWorld, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(world.model), "--images", str(texts(Path("images"))), *world.query]
    main(["budget", "attribute", *words, "--method", "pixel"])
    assert "measured on one device" in capsys.readouterr().out


@pytest.mark.parametrize("made", [texts, kohya, toml, only_train])
def test_the_laboratorys_data_module_reads_the_same(empty: Path, made: Maker) -> None:
    layout = None if made is not texts else "sidecar"
    data = ImageFolder(str(made(Path("images"))), options=ImageFolderOptions(8, layout=layout), store="cache")
    train, held_out = data.load()
    assert data.census().training == len(train) == (4 if made in (kohya, toml) else 3)
    assert not len(held_out), "nothing is held out of a model that is trained already"
