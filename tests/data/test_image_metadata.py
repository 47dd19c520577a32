"""Metadata of captioned folders: three formats, splits, and everything that users get wrong."""

from __future__ import annotations

import csv
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.folders import FORMATS, make, paint, write_metadata
from wherefrom.data.image_folder import split_images
from wherefrom.data.image_set import ImageSet


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_gives_the_same_images(folder: Path, build: Callable[..., ImageSet], kind: str) -> None:
    captions = ["<script>alert('x')</script>", 'quotes " and, commas\nand lines', "naïve 🦊" * 50_000]
    pixels = [paint(folder / f"{name}.png", index) for index, name in enumerate(("c", "sub/b", "a"))]
    rows = [
        {"file_name": f"{name}.png", "text": text, "artist": artist}
        for name, text, artist in zip(("c", "sub/b", "a"), captions, ("x", "", "z"), strict=True)
    ]
    write_metadata(folder, rows, kind)
    limit = csv.field_size_limit()
    images = build()
    assert csv.field_size_limit() == limit
    assert images.ids == ("a.png", "c.png", "sub/b.png")
    assert images.captions == ((captions[2],), (captions[0],), (captions[1],))
    assert images.columns == {
        "artist": ("z", "x", ""),
        "file_name": images.ids,
        "license": ("unknown",) * 3,
    }
    np.testing.assert_array_equal(images.pixels, np.stack([pixels[2], pixels[0], pixels[1]]))
    assert isinstance(images.pixels, np.memmap)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_captions(folder: Path, build: Callable[..., ImageSet], kind: str) -> None:
    rows = make(folder, kind=kind)
    write_metadata(folder, [{**row, "text": [row["text"], "other"]} for row in rows], kind)
    assert build().captions == tuple((f"number {index}", "other") for index in range(3))


def test_empty_captions_are_captions_and_fewer_are_repeated(folder: Path, build: Callable[..., ImageSet]) -> None:
    rows = make(folder)
    several: list[Any] = ["", ["x", " ", "y"], ["p", "q"]]
    write_metadata(folder, [{**row, "text": text} for row, text in zip(rows, several, strict=True)])
    assert build().captions == (("",) * 6, ("x", "", "y") * 2, ("p", "q") * 3)
    many = [["a"] * 61, ["b"] * 2, "c"]
    write_metadata(folder, [{**row, "text": text} for row, text in zip(rows, many, strict=True)])
    with pytest.raises(ValueError, match=r"0\.png|line 1: the image has 61 captions.*122 of each"):
        build()


@pytest.mark.parametrize(
    ("column", "cell", "expected"),
    [
        ("caption", "a cat", ("a cat",)),
        ("prompt", "a cat", ("a cat",)),
        ("captions", ["a", "b"], ("a", "b")),
        ("tags", ["1girl", "solo"], ("1girl, solo",)),
        ("tags", "1girl, solo", ("1girl, solo",)),
    ],
)
def test_caption_columns_are_found(
    folder: Path, build: Callable[..., ImageSet], column: str, cell: Any, expected: tuple[str, ...]
) -> None:
    rows = make(folder)
    write_metadata(folder, [{"file_name": row["file_name"], column: cell, "author": "x"} for row in rows])
    images = build()
    assert images.captions == (expected,) * 3
    assert images.columns["author"] == ("x",) * 3
    write_metadata(folder, [{**row, column: cell} for row in rows])
    assert build().captions[0] == ("number 0",), "text comes first"


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train", "val"), ("train", "validation")),
        (("Training", "VALID"), ("train", "validation")),
        (("train", "dev"), ("train", "validation")),
        (("train", "Eval"), ("train", "validation")),
        (("TRAIN", "testing"), ("train", "test")),
        (("train",), ("train",)),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_splits_are_what_people_call_them(
    folder: Path, build: Callable[..., ImageSet], names: tuple[str, ...], splits: tuple[str, ...], inside: bool
) -> None:
    rows = []
    for name in names:
        made = make(folder / name, 2)
        rows += [{**row, "file_name": f"{name}/{row['file_name']}"} for row in made]
        if not inside:
            (folder / name / "metadata.jsonl").unlink()
    if not inside:
        write_metadata(folder, rows)
    images = build()
    assert dict(zip(images.columns["file_name"], images.columns["split"], strict=True)) == {
        f"{name}/{index}.png": split for name, split in zip(names, splits, strict=True) for index in range(2)
    }
    if not inside:
        write_metadata(folder, [{**row, "split": row["file_name"].split("/")[0]} for row in rows])
        assert build().columns["split"] == images.columns["split"]


def test_the_caption_column_has_a_name(folder: Path, build: Callable[..., ImageSet]) -> None:
    make(folder, captions="better")
    assert build(caption="captions").captions == (("better",),) * 3
    assert build().captions[0] == ("number 0",)
    assert "captions" not in build().columns, "it is the name of the captions themselves"
    with pytest.raises(ValueError, match=r"line 1: there is a column 'captions' beside 'text'"):
        build(columns=("captions",))
    assert build(columns=()).captions[0] == ("number 0",)


def test_licences_are_never_dropped(folder: Path, build: Callable[..., ImageSet]) -> None:
    rows = make(folder, 4)
    for row, cells in zip(rows, ({"license": "CC0"}, {"license": " "}, {"license": None}, {}), strict=True):
        row.update(cells, artist="x")
    write_metadata(folder, rows)
    for columns in ((), ("artist",), None):
        assert build(columns=columns).columns["license"] == ("CC0", "unknown", "unknown", "unknown")
    assert "artist" not in build(columns=()).columns
    assert build(columns=("artist",)).columns["artist"] == ("x",) * 4


def test_ids_from_a_column(folder: Path, build: Callable[..., ImageSet]) -> None:
    rows = make(folder)
    write_metadata(folder, [{**row, "id": key} for row, key in zip(rows, ("é", 17, "007"), strict=True)])
    images = build()
    assert images.ids == ("007", "17", "é")
    assert images.columns["file_name"] == ("2.png", "1.png", "0.png")
    assert "id" not in images.columns


def test_csv_ids_keep_their_zeros(folder: Path, build: Callable[..., ImageSet]) -> None:
    make(folder, 1, "csv", id="007")
    assert build().ids == ("007",)


def test_columns_may_hold_numbers_and_gaps(folder: Path, build: Callable[..., ImageSet]) -> None:
    rows = make(folder)
    for row, year in zip(rows, (1999, float("nan"), None), strict=True):
        row["year"] = year
    write_metadata(folder, rows)
    assert build().columns["year"] == ("1999", "", "")
    write_metadata(folder, [{**row, "boxes": [[1, 2]]} for row in rows])
    with pytest.raises(ValueError, match=r"line 1: 'boxes' holds a list, not text\. Name the columns to keep"):
        build()
    assert build(columns=("year",)).columns["year"] == ("1999", "", "")


def test_parquet_columns_that_are_not_wanted_are_not_read(folder: Path, build: Callable[..., ImageSet]) -> None:
    make(folder, kind="parquet", image=bytes(4 << 20))
    with pytest.raises(ValueError, match="'image' holds a bytes"):
        build()
    tracemalloc.start()
    try:
        images = build(columns=())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "image" not in images.columns
    assert peak < 2 << 20


def test_files_that_are_no_images_may_lie_around(folder: Path, build: Callable[..., ImageSet]) -> None:
    make(folder)
    for name in ("README.md", ".hidden.png", ".cache/x.png", "__MACOSX/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert len(build()) == 3


def test_split_column(folder: Path, build: Callable[..., ImageSet]) -> None:
    rows = make(folder, 4)
    splits = ("train", "validation", "test", "train")
    write_metadata(folder, [{**row, "split": split} for row, split in zip(rows, splits, strict=True)])
    images = build()
    assert images.columns["split"] == splits
    train, validation = split_images(images, 0.9)
    assert (train.ids, validation.ids) == (("0.png", "3.png"), ("1.png",))


@pytest.mark.parametrize("kind", FORMATS)
def test_split_folders_with_metadata_each(folder: Path, build: Callable[..., ImageSet], kind: str) -> None:
    make(folder / "train", 3, kind)
    make(folder / "validation", 2, kind)
    images = build()
    assert images.ids == ("train/0.png", "train/1.png", "train/2.png", "validation/0.png", "validation/1.png")
    assert images.columns["split"] == ("train",) * 3 + ("validation",) * 2
    write_metadata(folder / "train", [{"file_name": f"{i}.png", "text": "x", "split": "test"} for i in range(3)], kind)
    with pytest.raises(ValueError, match=r"'test' is not that of its folder, 'train'"):
        build()


def test_split_folders_below_one_metadata_file(folder: Path, build: Callable[..., ImageSet]) -> None:
    names = ["train/a.png", "train/deep/b.png", "validation/a.png"]
    for index, name in enumerate(names):
        paint(folder / name, index)
    write_metadata(folder, [{"file_name": name, "text": "x"} for name in names])
    assert build().columns["split"] == ("train", "train", "validation")
    paint(folder / "c.png", 9)
    write_metadata(folder, [{"file_name": name, "text": "x"} for name in [*names, "c.png"]])
    with pytest.raises(ValueError, match=r"images in 'validation' and others beside them.*Add a column 'split'"):
        build()


def test_a_class_called_train_is_no_split(folder: Path, build: Callable[..., ImageSet]) -> None:
    names = ["train/a.png", "bus/a.png"]
    for index, name in enumerate(names):
        paint(folder / name, index)
    write_metadata(folder, [{"file_name": name, "text": "x"} for name in names])
    assert "split" not in build().columns


def test_no_folder_no_metadata_two_metadata(folder: Path, build: Callable[..., ImageSet]) -> None:
    with pytest.raises(ValueError, match="there is no folder or file"):
        build()
    make(folder)
    (folder / "metadata.jsonl").rename(folder / "captions.jsonl")
    with pytest.raises(ValueError, match="holds 3 images and no captions"):
        build()
    make(folder)
    make(folder, kind="csv")
    with pytest.raises(ValueError, match=r"2 metadata files \('metadata\.jsonl', 'metadata\.csv'\)\. Keep one"):
        build()


def test_metadata_above_and_below(folder: Path, build: Callable[..., ImageSet]) -> None:
    make(folder)
    make(folder / "train")
    with pytest.raises(ValueError, match=r"holds a metadata file and so do its subfolders .*train/metadata\.jsonl"):
        build()
    (folder / "train").rename(folder / "val")
    with pytest.raises(ValueError, match=r"holds a metadata file and so do its subfolders .*val/metadata\.jsonl"):
        build()
    (folder / "val").rename(folder / "more")
    with pytest.raises(ValueError, match=r"more/metadata\.jsonl would not be read: .*train, validation, test below it"):
        build()


def test_images_that_no_metadata_names(folder: Path, build: Callable[..., ImageSet]) -> None:
    make(folder)
    for index in range(6):
        paint(folder / "more" / f"{index}.JPG", index)
    with pytest.raises(
        ValueError, match=r"holds 6 images that no metadata names: 'more/0\.JPG'.*, …\. Add a row for each"
    ):
        build()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, r"line 2: the caption \('text'\) is missing"),
        ({"text": float("nan")}, r"line 2: the caption \('text'\) is missing"),
        ({"text": []}, r"line 2: the caption \('text'\) is missing"),
        ({"text": {"en": "x"}}, r"line 2: 'text' holds a dict, not text"),
        ({"text": ["x", ["y"]]}, r"line 2: 'text' holds a list, not text"),
        ({"text": "\ud83d"}, r"line 2: 'text' holds half a surrogate pair"),
        ({"file_name": None}, r"line 2: 'file_name' is missing"),
        ({"file_name": "nosuch.png"}, r"line 2: there is no file 'nosuch\.png' in .*Add the image or remove the row"),
        ({"file_name": "."}, r"line 2: there is no file '\.'"),
        ({"file_name": "x" * 5000}, r"line 2: there is no file 'xxx"),
        ({"file_name": "1.png\0"}, r"line 2: the file name .* holds a NUL"),
        ({"file_name": "sub/../../secret.png"}, r"line 2: .*leads out of"),
        ({"file_name": "../secret.png"}, r"line 2: '\.\./secret\.png' leads out of"),
        ({"file_name": "/etc/passwd"}, r"line 2: '/etc/passwd' leads out of"),
        ({"file_name": "link.png"}, r"line 2: 'link\.png' leads out of"),
        ({"file_name": "linked/secret.png"}, r"line 2: 'linked/secret\.png' leads out of"),
        ({"file_name": "loop.png"}, r"line 2: there is no file 'loop\.png'"),
        ({"id": "other\0"}, r"line 2: the id 'other\\x00' holds a NUL character or a line break"),
        ({"id": "other\n"}, r"line 2: the id 'other\\n' holds a NUL character or a line break"),
        ({"id": None}, r"line 2: the id None is not valid"),
        ({"id": " "}, r"line 2: the id ' ' is not valid"),
        ({"id": 1.0}, r"line 2: the id 1\.0 is not valid"),
        ({"id": "0.png"}, r"line 1 and .*line 2 have the same id '0\.png'"),
        ({"file_name": "./0.png"}, r"line 1 and .*line 2 have the same id '0\.png'.* as a list"),
        ({"split": "train"}, r"line 1: the split is missing, while other images have one"),
        ({"split": "holdout"}, r"line 2: the split 'holdout' is not one of train, validation, test"),
    ],
)
def test_bad_rows(
    tmp_path: Path, folder: Path, build: Callable[..., ImageSet], change: dict[str, Any], message: str
) -> None:
    rows = make(folder)
    if "id" in change:
        rows = [{**row, "id": row["file_name"]} for row in rows]
    paint(tmp_path / "secret.png", 7)
    (folder / "sub").mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to("loop.png")
    write_metadata(folder, [rows[0], {**rows[1], **change}, rows[2]])
    with pytest.raises(ValueError, match=message):
        build()


def test_links_within_the_folder_are_followed(folder: Path, build: Callable[..., ImageSet]) -> None:
    rows = make(folder, 1)
    (folder / "1.png").symlink_to("0.png")
    write_metadata(folder, [rows[0], {"file_name": "1.png", "text": "x"}])
    images = build()
    np.testing.assert_array_equal(images.pixels[0], images.pixels[1])


def test_either_all_images_have_an_id_or_none(folder: Path, build: Callable[..., ImageSet]) -> None:
    rows = make(folder)
    write_metadata(folder, [{**rows[0], "id": "x"}, *rows[1:]])
    with pytest.raises(ValueError, match="line 2: the id None is not valid"):
        build()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("column", ["file_name", "text"])
def test_missing_columns(folder: Path, build: Callable[..., ImageSet], kind: str, column: str) -> None:
    make(folder, kind=kind)
    other = "file_name" if column == "text" else "text"
    write_metadata(folder, [{other: "0.png", "more": "x"}], kind)
    present = ", ".join(sorted((f"'{other}'", "'more'")))
    with pytest.raises(ValueError, match=rf"metadata\.{kind} has no column '{column}', only {present}\. Add"):
        build()


def test_a_wanted_column_that_is_not_there(folder: Path, build: Callable[..., ImageSet]) -> None:
    make(folder)
    with pytest.raises(ValueError, match="has no column 'artist', only 'file_name', 'text'"):
        build(columns=("artist",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b"", "lists no image"),
        ("metadata.jsonl", b'\n\n{"file_name": "0.png"', r"line 3 is not valid JSON"),
        ("metadata.jsonl", b'["0.png", "x"]', r"line 1 is not a JSON object"),
        ("metadata.jsonl", b"[" * 200_000, r"line 1 is not valid JSON"),
        ("metadata.jsonl", b'{"file_name": "\xff"}', r"metadata\.jsonl is not UTF-8"),
        ("metadata.csv", b"", "lists no image"),
        ("metadata.csv", b"file_name,text\n", "lists no image"),
        ("metadata.csv", b"file_name,text\n0.png,red, round\n", "line 2 has 3 cells, but the header names 2"),
        ("metadata.csv", b"file_name,text\n0.png\n", "line 2 has 1 cells, but the header names 2"),
        ("metadata.csv", b'file_name,text\n0.png,"x\n', "is not valid CSV"),
        ("metadata.csv", b"file_name,text,text\n0.png,x,y\n", "two columns have the same name"),
        ("metadata.csv", b"file_name,text\n0.png,\xff\n", r"metadata\.csv is not UTF-8"),
        ("metadata.parquet", b"PAR1 not really", "is not a readable parquet file"),
        ("metadata.parquet", b"", "is not a readable parquet file"),
    ],
)
def test_broken_metadata(folder: Path, build: Callable[..., ImageSet], name: str, content: bytes, message: str) -> None:
    paint(folder / "0.png", 0)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_byte_order_mark_is_not_part_of_the_first_column(
    folder: Path, build: Callable[..., ImageSet], kind: str
) -> None:
    make(folder, kind=kind)
    path = folder / f"metadata.{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(build()) == 3
