"""Hugging Face's data sets from the words to a ranking: parquet, `save_to_disk`, a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import DatasetDict

from tests.support.hugging_face import dataset, encoded, hub_layout
from tests.support.user_world import UserWorld
from wherefrom.cli import main
from wherefrom.rankings.ranking_file import read_ranking

FEW = ["--method", "pixel"]


def ranked(world: UserWorld, images: str | Path, *more: str) -> list[str]:
    """Ids of the images that one line ranks."""
    main(["attribute", "--model", str(world.model), "--images", str(images), *world.query, "--output", "run", *more])
    ((ids, _),) = read_ranking(Path("run")).values()
    return sorted(ids)


def test_a_parquet_file_is_attributed_in_one_line(
    world: UserWorld, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(6, named=True).to_parquet("data.parquet")
    few = {"grid.timesteps": 2, "noise_samples": 16, "fisher.samples_per_image": 1}
    settings = [word for key, value in few.items() for word in ("--set", f"{key}={value}")]
    assert ranked(world, "data.parquet", "--method", "influence", *settings) == [
        f"picture-{n:03d}.png" for n in range(6)
    ]
    assert "as parquet" in capsys.readouterr().err
    page = Path("run/report.html").read_text()
    assert "author 1" in page
    assert "oil" in page


def test_the_hubs_layout_and_saved_data_sets_are_ranked(world: UserWorld, empty: Path) -> None:
    splits = {"train": dataset(4), "validation": dataset(2, 4)}
    hub_layout(Path("set"), splits)
    assert ranked(world, "set", *FEW) == [f"data/train-00000-of-00001.parquet:{n:09d}" for n in range(4)]
    DatasetDict(splits).save_to_disk("saved")
    Path("run").rename("first")
    assert ranked(world, "saved", *FEW) == [f"train/data-00000-of-00001.arrow:{n:09d}" for n in range(4)]


def test_a_column_of_images_is_chosen(world: UserWorld, empty: Path) -> None:
    masks = [{"bytes": encoded(n), "path": None} for n in range(3)]
    dataset(3, named=True, mask=masks).to_parquet("data.parquet")
    with pytest.raises(ValueError, match=r"several columns of images, .image., .mask.\. Name one in --image-column"):
        ranked(world, "data.parquet", *FEW)
    assert len(ranked(world, "data.parquet", *FEW, "--image-column", "mask")) == 3


def test_a_hub_id_is_ranked(world: UserWorld, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_layout(Path("far"), {"train": dataset(3)})
    load = datasets.load_dataset

    def near(repository: str, *arguments: Any, **options: Any) -> Any:
        return load(str(Path("far")), **options)

    with pytest.raises(
        ValueError, match="'someone/pictures' is neither a folder here nor a data set that could be had"
    ):
        ranked(world, "someone/pictures", *FEW)
    monkeypatch.setattr(datasets, "load_dataset", near)
    assert ranked(world, "someone/pictures", *FEW) == [
        f"someone/pictures/train/00000.parquet:{n:09d}" for n in range(3)
    ]
