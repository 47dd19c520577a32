"""Parquet files, `save_to_disk` folders and hub ids: real ones, made by `datasets`, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import DatasetDict, Image

from tests.support.hugging_face import dataset, encoded, hub_layout, painted
from wherefrom.data.image_files import load_image
from wherefrom.data.layouts import hub, table_files
from wherefrom.data.layouts.base import ImageReader, ReadingOptions
from wherefrom.data.layouts.detection import open_images
from wherefrom.data.layouts.parquet import split_of_file


def read(place: str | Path, **options: Any) -> ImageReader:
    return open_images(place, ReadingOptions(**options)).reader


def numbers(reader: ImageReader) -> list[int]:
    """Which painted image each row's is."""
    known = {painted(n).tobytes(): n for n in range(40)}
    return [known[load_image(reader.open_image(row), None).tobytes()] for row in reader.rows]


def test_a_parquet_file_is_read_with_captions_columns_and_labels(tmp_path: Path) -> None:
    dataset().to_parquet(tmp_path / "data.parquet")
    opened = open_images(tmp_path / "data.parquet")
    reader = opened.reader
    assert reader.layout == "parquet"
    assert "reads" in opened.lines[0]
    assert "as parquet" in opened.lines[0]
    assert any("neither text nor numbers: 'boxes'" in line for line in opened.lines)
    assert [row.id for row in reader.rows] == [f"data.parquet:{n:09d}" for n in range(5)]
    assert [row.captions for row in reader.rows] == [(f"number {n}",) for n in range(5)]
    assert reader.rows[1].columns == {
        "author": "author 1", "style": "ink", "license": "unknown", "file_name": "data.parquet:000000001",
    }  # fmt: skip
    assert {row.split for row in reader.rows} == {""}
    assert numbers(reader) == [0, 1, 2, 3, 4]
    assert len({reader.content_key(row) for row in reader.rows}) == 5


def test_the_hubs_folders_have_their_splits(tmp_path: Path) -> None:
    hub_layout(tmp_path / "set", {"train": dataset(3), "validation": dataset(2, 3)})
    reader = read(tmp_path / "set")
    assert [row.split for row in reader.rows] == ["train"] * 3 + ["validation"] * 2
    assert reader.rows[0].id == "data/train-00000-of-00001.parquet:000000000"
    assert numbers(reader) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/validation-00001-of-00002-0123456789abcdef.parquet", "validation"),
        ("default/test/0000.parquet", "test"),
        ("Val.parquet", "validation"),
        ("training/part.parquet", "train"),
        ("trains.parquet", ""),
    ],
)
def test_the_split_is_in_the_name_of_file_or_folder(name: str, split: str) -> None:
    assert split_of_file(name) == split


def test_ids_are_the_column_or_the_files_of_the_images(tmp_path: Path) -> None:
    dataset(named=True).to_parquet(tmp_path / "named.parquet")
    reader = read(tmp_path / "named.parquet")
    assert [row.id for row in reader.rows] == [f"picture-{n:03d}.png" for n in range(5)]
    assert reader.rows[2].columns["file_name"] == "picture-002.png"
    # The same name twice is no id.
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        dataset(2, named=True).to_parquet(tmp_path / "two" / f"{name}.parquet")
    assert [row.id for row in read(tmp_path / "two").rows][::2] == ["a.parquet:000000000", "b.parquet:000000000"]
    dataset(3, id=["z", "x", "y"]).to_parquet(tmp_path / "ids.parquet")
    assert [row.id for row in read(tmp_path / "ids.parquet").rows] == ["x", "y", "z"]
    dataset(3, id=["z", "x", "z"]).to_parquet(tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"same id 'z'"):
        read(tmp_path / "twice.parquet")


@pytest.mark.parametrize("ordered", [True, False])
def test_images_are_found_in_any_order_a_few_at_a_time(
    tmp_path: Path, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = list(range(20)) if ordered else np.random.default_rng(0).permutation(20).tolist()
    table = dataset(20, id=[f"{n:02d}" for n in order])
    (tmp_path / "parquet").mkdir()
    pq.write_table(table.data.table, tmp_path / "parquet" / "groups.parquet", row_group_size=7)
    table.save_to_disk(tmp_path / "arrow", num_shards=3)
    monkeypatch.setattr(table_files, "_ROWS", 3)
    for place in (tmp_path / "parquet" / "groups.parquet", tmp_path / "arrow"):
        reader = read(place)
        expected = np.argsort(order).tolist()
        assert numbers(reader) == expected
        assert numbers(reader) == expected, "again, as headers come before pixels"
        assert load_image(reader.open_image(reader.rows[13]), None).tobytes() == painted(expected[13]).tobytes()


def test_never_more_than_a_few_images_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(dataset(40).data.table, tmp_path / "one_group.parquet")
    monkeypatch.setattr(table_files, "_ROWS", 4)
    sizes = []
    batches = table_files.ParquetTable.batches

    def watched(self: Any, *arguments: Any) -> Any:
        for batch in batches(self, *arguments):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(table_files.ParquetTable, "batches", watched)
    assert numbers(read(tmp_path / "one_group.parquet")) == list(range(40))
    assert max(sizes) == 4


def test_plain_binary_columns_and_a_choice_of_several(tmp_path: Path) -> None:
    table = pa.table({"png": [encoded(1), encoded(2)], "mask": [encoded(3), encoded(4)], "prompt": ["a", "b"]})
    pq.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(
        ValueError, match=r"several columns of images, 'png', 'mask'. Name one in the option 'image_column'"
    ):
        read(tmp_path / "data.parquet")
    reader = read(tmp_path / "data.parquet", image_column="mask")
    assert numbers(reader) == [3, 4]
    assert reader.caption == "prompt"
    with pytest.raises(ValueError, match="no column 'text' of images; it has 'png', 'mask'"):
        read(tmp_path / "data.parquet", image_column="text")


def test_captions_may_be_lists_or_empty_and_be_named(tmp_path: Path) -> None:
    dataset(2, text=[["one", "two"], ["three", "four"]]).to_parquet(tmp_path / "lists.parquet")
    assert [row.captions for row in read(tmp_path / "lists.parquet").rows] == [("one", "two"), ("three", "four")]
    dataset(2, caption=["", "named"]).to_parquet(tmp_path / "data.parquet")
    opened = open_images(tmp_path / "data.parquet", ReadingOptions(caption="caption"))
    assert [row.captions for row in opened.reader.rows] == [("",), ("named",)]
    assert any("1 image of 2 without a caption" in line for line in opened.lines)
    with pytest.raises(ValueError, match=r"no column of captions called 'prompt', only .*option 'caption'"):
        read(tmp_path / "data.parquet", caption="prompt")


def test_further_types_of_text_numbers_and_bytes(tmp_path: Path) -> None:
    """As other writers than `datasets` choose them."""
    table = pa.table(
        {
            "image": pa.array([encoded(1)], pa.large_binary()),
            "caption": pa.array(["one"], pa.large_string()),
            "kind": pa.array(["oil"]).dictionary_encode(),
            "year": pa.array([1998], pa.int16()),
            "score": pa.array([0.5]),
            "made": pa.array([0], pa.date32()),
            "nothing": pa.array([None], pa.null()),
            "vector": pa.array([[1.0]]),
        }
    )
    pq.write_table(table, tmp_path / "data.parquet")
    (row,) = read(tmp_path / "data.parquet").rows
    assert row.captions == ("one",)
    kept = {name: row.columns[name] for name in row.columns if name not in ("license", "file_name")}
    assert kept == {"kind": "oil", "year": "1998", "score": "0.5", "made": "1970-01-01", "nothing": ""}


def test_columns_may_be_chosen(tmp_path: Path) -> None:
    dataset(2).to_parquet(tmp_path / "data.parquet")
    assert set(read(tmp_path / "data.parquet", columns=("author",)).rows[0].columns) == {
        "author",
        "license",
        "file_name",
    }
    with pytest.raises(ValueError, match="no column 'artist'"):
        read(tmp_path / "data.parquet", columns=("artist",))
    with pytest.raises(ValueError, match="'boxes' is of the type list"):
        read(tmp_path / "data.parquet", columns=("boxes",))


def test_saved_data_sets_are_read(tmp_path: Path) -> None:
    DatasetDict(train=dataset(3), test=dataset(2, 3)).save_to_disk(tmp_path / "both")
    reader = read(tmp_path / "both")
    assert reader.layout == "save_to_disk"
    assert [row.split for row in reader.rows] == ["test"] * 2 + ["train"] * 3
    assert numbers(reader) == [3, 4, 0, 1, 2]
    assert reader.rows[-1].id == "train/data-00000-of-00001.arrow:000000002"
    assert reader.rows[0].columns["style"] == "ink"
    dataset(4).select([2, 0]).save_to_disk(tmp_path / "one")
    assert numbers(read(tmp_path / "one")) == [2, 0]
    assert {row.split for row in read(tmp_path / "one").rows} == {""}


@pytest.mark.parametrize("name", ["../data-00000-of-00001.arrow", "/etc/passwd", ".hidden", ""])
def test_a_saved_data_set_names_only_files_of_its_own(tmp_path: Path, name: str) -> None:
    dataset(1).save_to_disk(tmp_path / "one")
    state = tmp_path / "one" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_data_files": [{"filename": name}]}))
    with pytest.raises(ValueError, match="is no file beside it"):
        read(tmp_path / "one")


def test_damaged_saved_data_sets_are_refused(tmp_path: Path) -> None:
    dataset(1).save_to_disk(tmp_path / "one")
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=r"not a readable Arrow file .*Save the data set again"):
        read(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="lists no data files"):
        read(tmp_path / "one")


def test_tables_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    file.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"data\.parquet is not a readable parquet file"):
        read(file)
    pq.write_table(pa.table({"image": [[encoded(0)]], "text": ["a"]}), file)
    with pytest.raises(
        ValueError, match=r"no column of images, .*columns of lists and other structs \('image'\) are not"
    ):
        read(file, layout="parquet")
    named = pa.array(
        [{"bytes": None, "path": "/etc/passwd"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"image": named, "text": ["a"]}), file)
    with pytest.raises(ValueError, match=r"row 0: the image .* is only named, as '/etc/passwd'"):
        read(file)
    pickled = pa.field("thing", pa.string(), metadata={"ARROW:extension:name": "arrow.py_extension_type"})
    schema = pa.schema([pa.field("image", pa.binary()), pa.field("text", pa.string()), pickled])
    pq.write_table(pa.table([[encoded(0)], ["a"], ["cos\nsystem\n"]], schema=schema), file)
    with pytest.raises(ValueError, match="'thing' holds pickled objects, which are never read"):
        read(file)
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}), file)
    with pytest.raises(ValueError, match="its tables have no rows"):
        read(file)


def test_splits_in_doubt_are_refused(tmp_path: Path) -> None:
    hub_layout(tmp_path / "set", {"train": dataset(1), "more": dataset(1, 1)})
    with pytest.raises(ValueError, match=r"has no split, while .* is of 'train'"):
        read(tmp_path / "set")
    DatasetDict(train=dataset(1), more=dataset(1, 1)).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="names the split 'more' beside"):
        read(tmp_path / "both")


def test_unknown_splits_are_said(tmp_path: Path) -> None:
    splits = {"train_sft": dataset(1), "test_sft": dataset(1, 1)}
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    for place in (hub_layout(tmp_path / "set", splits), tmp_path / "both"):
        opened = open_images(place)
        assert len(opened.reader.rows) == 2
        assert any("takes all of 'test_sft', 'train_sft' as training images" in line for line in opened.lines)


def test_a_hub_id_is_streamed_once_into_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset` is given a folder in place of the id: the hub is out of reach, the library is the real one."""
    hub_layout(tmp_path / "far", {"train": dataset(3), "test": dataset(2, 3)})
    asked, load = [], datasets.load_dataset

    def near(repository: str, *arguments: Any, **options: Any) -> Any:
        asked.append((repository, *arguments, options["streaming"]))
        return load(str(tmp_path / "far"), **options)

    monkeypatch.setattr(datasets, "load_dataset", near)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        opened = open_images("someone/pictures", ReadingOptions(cache=tmp_path / "store"))
        reader = opened.reader
        assert reader.layout == "hub"
        assert [row.split for row in reader.rows] == ["test"] * 2 + ["train"] * 3
        assert numbers(reader) == [3, 4, 0, 1, 2]
        assert reader.rows[0].columns["style"] == "ink"
    assert asked == [("someone/pictures", None, True)]
    assert any("delete that folder to download it again" in line for line in opened.lines)


def test_images_that_a_streamed_data_set_only_names_are_put_in(tmp_path: Path) -> None:
    paths = []
    for n in range(3):
        paths.append(str(tmp_path / f"{n}.png"))
        Path(paths[-1]).write_bytes(encoded(n))
    named = datasets.Dataset.from_dict({"image": paths, "text": ["a", "b", "c"]}).cast_column("image", Image())
    assert hub.write_splits(datasets, {"train": named.to_iterable_dataset()}, tmp_path / "set") == {"train": 3}
    assert numbers(read(tmp_path / "set")) == [0, 1, 2]


def test_a_hub_that_is_out_of_reach_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"'someone/pictures' is neither a folder here nor a data set that could be had"
    ):
        open_images("someone/pictures", ReadingOptions(cache=tmp_path / "store"))
    assert not list((tmp_path / "store").rglob("*.parquet"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"needs datasets, which is not installed: pip install 'wherefrom\[datasets\]'"
    ):
        open_images("someone/pictures", ReadingOptions(cache=tmp_path / "store"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/name:small@main", ("owner/name", "small", "main")),
        ("owner/name@refs/convert/parquet", ("owner/name", None, "refs/convert/parquet")),
        ("../name", None),
        ("a/b/c", None),
        ("folder", None),
    ],
)
def test_ids_of_the_hub(given: str, expected: tuple[str | None, ...] | None) -> None:
    found = hub.HubId.of(given)
    assert (None if found is None else (found.repository, found.config, found.revision)) == expected
