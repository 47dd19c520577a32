"""A folder of captioned pictures: three metadata formats, splits, pixels, and everything that users get wrong."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import resource
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamodules import ImageFolder
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder, draw, split_pictures
from wherefrom.data.pictures import Pictures
from wherefrom.storage import StorageError, Store, read_manifest

Rows = list[dict[str, Any]]
FORMATS = ("jsonl", "csv", "parquet")


def write_metadata(folder: Path, rows: Rows, kind: str = "jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"metadata.{kind}"
    names = list(dict.fromkeys(name for row in rows for name in row))
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


def paint(path: Path, seed: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def make(folder: Path, count: int = 3, kind: str = "jsonl", **cells: Any) -> Rows:
    """Pictures 0.png, 1.png, … with captions; further cells are the same for all."""
    rows = [{"file_name": f"{index}.png", "text": f"number {index}", **cells} for index in range(count)]
    for index, row in enumerate(rows):
        paint(folder / row["file_name"], index)
    write_metadata(folder, rows, kind)
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "folder"


@pytest.fixture
def build(tmp_path: Path, folder: Path) -> Callable[..., Pictures]:
    def build(**options: Any) -> Pictures:
        return build_image_folder(Store(tmp_path / "store"), folder, ImageFolderOptions(**options))

    return build


# What is read


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_gives_the_same_pictures(folder: Path, build: Callable[..., Pictures], kind: str) -> None:
    captions = ["<script>alert('x')</script>", 'quotes " and, commas\nand lines', "naïve 🦊" * 50_000]
    pixels = [paint(folder / f"{name}.png", index) for index, name in enumerate(("c", "sub/b", "a"))]
    rows = [
        {"file_name": f"{name}.png", "text": text, "artist": artist}
        for name, text, artist in zip(("c", "sub/b", "a"), captions, ("x", "", "z"), strict=True)
    ]
    write_metadata(folder, rows, kind)
    limit = csv.field_size_limit()
    pictures = build()
    assert csv.field_size_limit() == limit
    assert pictures.ids == ("a.png", "c.png", "sub/b.png")
    assert pictures.captions == ((captions[2],), (captions[0],), (captions[1],))
    assert pictures.columns == {
        "artist": ("z", "x", ""),
        "file_name": pictures.ids,
        "license": ("unknown",) * 3,
    }
    np.testing.assert_array_equal(pictures.pixels, np.stack([pixels[2], pixels[0], pixels[1]]))
    assert isinstance(pictures.pixels, np.memmap)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_captions(folder: Path, build: Callable[..., Pictures], kind: str) -> None:
    rows = make(folder, kind=kind)
    write_metadata(folder, [{**row, "text": [row["text"], "other"]} for row in rows], kind)
    assert build().captions == tuple((f"number {index}", "other") for index in range(3))


def test_the_caption_column_has_a_name(folder: Path, build: Callable[..., Pictures]) -> None:
    make(folder, captions="better")
    assert build(caption="captions").captions == (("better",),) * 3
    with pytest.raises(ValueError, match=r"line 1: there is a column 'captions' beside 'text'"):
        build()
    assert build(columns=()).captions[0] == ("number 0",)


def test_licences_are_never_dropped(folder: Path, build: Callable[..., Pictures]) -> None:
    rows = make(folder, 4)
    for row, cells in zip(rows, ({"license": "CC0"}, {"license": " "}, {"license": None}, {}), strict=True):
        row.update(cells, artist="x")
    write_metadata(folder, rows)
    for columns in ((), ("artist",), None):
        assert build(columns=columns).columns["license"] == ("CC0", "unknown", "unknown", "unknown")
    assert "artist" not in build(columns=()).columns
    assert build(columns=("artist",)).columns["artist"] == ("x",) * 4


def test_ids_from_a_column(folder: Path, build: Callable[..., Pictures]) -> None:
    rows = make(folder)
    write_metadata(folder, [{**row, "id": key} for row, key in zip(rows, ("é", 17, "007"), strict=True)])
    pictures = build()
    assert pictures.ids == ("007", "17", "é")
    assert pictures.columns["file_name"] == ("2.png", "1.png", "0.png")
    assert "id" not in pictures.columns


def test_csv_ids_keep_their_zeros(folder: Path, build: Callable[..., Pictures]) -> None:
    make(folder, 1, "csv", id="007")
    assert build().ids == ("007",)


def test_columns_may_hold_numbers_and_gaps(folder: Path, build: Callable[..., Pictures]) -> None:
    rows = make(folder)
    for row, year in zip(rows, (1999, float("nan"), None), strict=True):
        row["year"] = year
    write_metadata(folder, rows)
    assert build().columns["year"] == ("1999", "", "")
    write_metadata(folder, [{**row, "boxes": [[1, 2]]} for row in rows])
    with pytest.raises(ValueError, match=r"line 1: 'boxes' holds a list, not text\. Name the columns to keep"):
        build()
    assert build(columns=("year",)).columns["year"] == ("1999", "", "")


def test_parquet_columns_that_are_not_wanted_are_not_read(folder: Path, build: Callable[..., Pictures]) -> None:
    make(folder, kind="parquet", image=bytes(4 << 20))
    with pytest.raises(ValueError, match="'image' holds a bytes"):
        build()
    tracemalloc.start()
    try:
        pictures = build(columns=())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "image" not in pictures.columns
    assert peak < 2 << 20


def test_files_that_are_no_pictures_may_lie_around(folder: Path, build: Callable[..., Pictures]) -> None:
    make(folder)
    for name in ("README.md", ".hidden.png", ".cache/x.png", "__MACOSX/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert len(build()) == 3


# Splits


def test_split_column(folder: Path, build: Callable[..., Pictures]) -> None:
    rows = make(folder, 4)
    splits = ("train", "validation", "test", "train")
    write_metadata(folder, [{**row, "split": split} for row, split in zip(rows, splits, strict=True)])
    pictures = build()
    assert pictures.columns["split"] == splits
    train, validation = split_pictures(pictures, 0.9)
    assert (train.ids, validation.ids) == (("0.png", "3.png"), ("1.png",))


@pytest.mark.parametrize("kind", FORMATS)
def test_split_folders_with_metadata_each(folder: Path, build: Callable[..., Pictures], kind: str) -> None:
    make(folder / "train", 3, kind)
    make(folder / "validation", 2, kind)
    pictures = build()
    assert pictures.ids == ("train/0.png", "train/1.png", "train/2.png", "validation/0.png", "validation/1.png")
    assert pictures.columns["split"] == ("train",) * 3 + ("validation",) * 2
    write_metadata(folder / "train", [{"file_name": f"{i}.png", "text": "x", "split": "test"} for i in range(3)], kind)
    with pytest.raises(ValueError, match=r"'test' is not that of its folder, 'train'"):
        build()


def test_split_folders_below_one_metadata_file(folder: Path, build: Callable[..., Pictures]) -> None:
    names = ["train/a.png", "train/deep/b.png", "validation/a.png"]
    for index, name in enumerate(names):
        paint(folder / name, index)
    write_metadata(folder, [{"file_name": name, "text": "x"} for name in names])
    assert build().columns["split"] == ("train", "train", "validation")
    paint(folder / "c.png", 9)
    write_metadata(folder, [{"file_name": name, "text": "x"} for name in [*names, "c.png"]])
    with pytest.raises(ValueError, match=r"pictures in 'validation' and others beside them.*Add a column 'split'"):
        build()


def test_a_class_called_train_is_no_split(folder: Path, build: Callable[..., Pictures]) -> None:
    names = ["train/a.png", "bus/a.png"]
    for index, name in enumerate(names):
        paint(folder / name, index)
    write_metadata(folder, [{"file_name": name, "text": "x"} for name in names])
    assert "split" not in build().columns


def unsplit(count: int, **columns: tuple[str, ...]) -> Pictures:
    ids = tuple(f"{index}.png" for index in range(count))
    return Pictures(ids, (("x",),) * count, np.zeros((count, 1, 1, 3), np.uint8), columns)


def test_a_share_is_held_out_by_id() -> None:
    train, validation = split_pictures(unsplit(4000), 0.05)
    assert abs(len(validation) - 200) < 4 * math.sqrt(4000 * 0.05 * 0.95)
    assert sorted(train.ids + validation.ids) == sorted(unsplit(4000).ids)
    fewer = unsplit(4000).subset(range(0, 4000, 3))
    assert set(split_pictures(fewer, 0.05)[1].ids) == set(validation.ids) & set(fewer.ids)
    assert set(validation.ids) < set(split_pictures(unsplit(4000), 0.1)[1].ids)


def test_a_share_is_taken_from_training_pictures_only() -> None:
    split = tuple("test" if index % 2 else "train" for index in range(400))
    train, validation = split_pictures(unsplit(400, split=split), 0.3)
    assert len(train) + len(validation) == 200
    assert set(validation.columns["split"]) == {"train"}


@pytest.mark.parametrize(("split", "share"), [("train", 0.0), ("train", 1.0), ("validation", 0.1), ("test", 0.1)])
def test_both_splits_need_pictures(split: str, share: float) -> None:
    with pytest.raises(ValueError, match=r"Of 5 pictures, \d are for training and \d for validation.*validation_share"):
        split_pictures(unsplit(5, split=(split,) * 5), share)


# Pixels


@pytest.mark.parametrize(
    ("size", "across", "down"), [((9, 4), slice(2, 6), slice(0, 4)), ((4, 7), slice(0, 4), slice(1, 5))]
)
def test_the_centre_is_cut_out(tmp_path: Path, size: tuple[int, int], across: slice, down: slice) -> None:
    pixels = paint(tmp_path / "x.png", 0, size)
    np.testing.assert_array_equal(draw(tmp_path / "x.png", 4), pixels[down, across])
    np.testing.assert_array_equal(draw(tmp_path / "x.png", None), pixels)


def test_reducing_averages(tmp_path: Path) -> None:
    fine = (
        np.indices((64, 64)).sum(0) % 2 * 200
    )  # a checkerboard of 0 and 200; taking every eighth pixel would give one
    Image.fromarray(fine.astype(np.uint8)).save(tmp_path / "x.png")
    assert np.abs(draw(tmp_path / "x.png", 8).astype(int) - 100).max() <= 4


def test_transparency_is_put_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 51, 255
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert draw(tmp_path / "rgba.png", None)[0, :, 0].tolist() == [255, 204, 0]
    Image.fromarray(rgba[:, :, 2:]).save(tmp_path / "la.png")
    assert draw(tmp_path / "la.png", None)[0, :, 0].tolist() == [255, 204, 0]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    assert draw(tmp_path / "p.png", None)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (6, lambda x: np.rot90(x, -1)),
        (8, np.rot90),
    ],
)
def test_pictures_stand_upright(tmp_path: Path, orientation: int, upright: Callable[[np.ndarray], np.ndarray]) -> None:
    pixels = paint(tmp_path / "x.png", 0, (5, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(draw(tmp_path / "x.png", None), upright(pixels))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert draw(tmp_path / "x.png", None)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_pixels_have_no_white(folder: Path, build: Callable[..., Pictures]) -> None:
    make(folder, 1)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "x.tif")
    write_metadata(folder, [{"file_name": name, "text": "x"} for name in ("0.png", "x.tif")])
    with pytest.raises(ValueError, match=r"x\.tif .*mode 'F' have no agreed white"):
        build()


def test_formats_that_run_programs_are_not_opened(folder: Path, build: Callable[..., Pictures]) -> None:
    make(folder, 1)
    Image.new("RGB", (8, 8)).save(folder / "0.png", format="EPS")
    with pytest.raises(ValueError, match=r"0\.png .*cannot be read: cannot identify"):
        build()


def test_one_size_is_asked_for(folder: Path, build: Callable[..., Pictures]) -> None:
    make(folder)
    paint(folder / "1.png", 1, (9, 8))
    with pytest.raises(
        ValueError, match=r"1\.png has the wrong size: 9x8 pixels, while '0\.png' has 8x8\. Set the option"
    ):
        build()
    assert build(size=4).pixels.shape == (3, 4, 4, 3)
    with pytest.raises(ValueError, match="size 0 is not"):
        build(size=0)


def test_pictures_of_one_size_need_not_be_square(folder: Path, build: Callable[..., Pictures]) -> None:
    make(folder, 1)
    pixels = paint(folder / "0.png", 1, (9, 5))
    np.testing.assert_array_equal(build().pixels[0], pixels)


# Cache


def test_the_store_is_used_and_never_stale(tmp_path: Path, folder: Path) -> None:
    store, drawn = Store(tmp_path / "store"), []

    def build(place: Path, **options: Any) -> Pictures:
        drawn.clear()
        return build_image_folder(store, place, ImageFolderOptions(**options), lambda *step: drawn.append(step))

    rows = make(folder)
    first = build(folder)
    assert drawn == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert build(folder).fingerprint == first.fingerprint
    assert not drawn
    build(folder.rename(tmp_path / "moved"))
    assert not drawn, "the same folder elsewhere is the same folder"
    folder = tmp_path / "moved"

    path, before = folder / "1.bmp", (folder / "0.png").stat()
    (folder / "1.png").unlink()
    rows[1]["file_name"] = path.name
    paint(path, 1)
    write_metadata(folder, rows)
    unchanged = build(folder)
    times = path.stat()
    paint(path, 2)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    changed = build(folder)
    assert drawn, "bytes count, not size and time"
    assert changed.ids == unchanged.ids
    assert changed.fingerprint != unchanged.fingerprint
    assert (folder / "0.png").stat() == before

    write_metadata(folder, rows[::-1])
    assert build(folder).fingerprint == changed.fingerprint
    write_metadata(folder, [{**row, "text": "new"} for row in rows])
    assert build(folder).fingerprint != changed.fingerprint
    assert build(folder, size=4).pixels.shape[1] == 4


def test_pixels_are_not_held_in_memory(folder: Path, build: Callable[..., Pictures]) -> None:
    count, size = 60, 160
    folder.mkdir()
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    write_metadata(folder, [{"file_name": "one.png", "text": "x", "id": str(index)} for index in range(count)])
    build(size=2)
    tracemalloc.start()
    try:
        pictures = build(size=size)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < pictures.pixels.nbytes / 4
    assert (pictures.pixels == (255, 0, 0)).all()


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_a_storage_error(folder: Path, build: Callable[..., Pictures]) -> None:
    make(folder)
    earlier = build()
    with full_disk(100_000), pytest.raises(StorageError, match=r"Cannot write .*pixels\.npy: File too large"):
        build(size=150)
    assert build().fingerprint == earlier.fingerprint
    assert build(size=150).pixels.shape == (3, 150, 150, 3)


# Unreadable pictures


def spoil(folder: Path) -> list[str]:
    """Cuts one picture short, replaces one by text, and empties one."""
    make(folder, 5)
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "2.png").write_text("not a picture")
    (folder / "4.png").write_bytes(b"")
    return ["1.png", "2.png", "4.png"]


def test_unreadable_pictures_are_named(folder: Path, build: Callable[..., Pictures]) -> None:
    for name in spoil(folder):
        with pytest.raises(ValueError, match=rf"{name} \(.*metadata\.jsonl, line .*cannot be read: .*skip_unreadable"):
            build()
        paint(folder / name, 0)
    assert len(build()) == 5


def test_unreadable_pictures_are_skipped_if_asked_and_counted(
    tmp_path: Path, folder: Path, build: Callable[..., Pictures], caplog: pytest.LogCaptureFixture
) -> None:
    spoiled = spoil(folder)
    for _ in range(2):  # built, then found in the store
        with caplog.at_level(logging.WARNING):
            pictures = build(skip_unreadable=True)
        assert "left out 3 of 5 pictures that cannot be read: '1.png', '2.png', '4.png'" in caplog.text
        caplog.clear()
    assert pictures.ids == ("0.png", "3.png")
    expected = np.stack([np.asarray(Image.open(folder / name)) for name in pictures.ids])
    np.testing.assert_array_equal(pictures.pixels, expected)
    (made,) = (tmp_path / "store" / "image_folder").iterdir()
    assert read_manifest(made)["skipped"] == spoiled
    with pytest.raises(ValueError, match=r"1\.png"):
        build()


def test_a_folder_without_any_readable_picture(folder: Path, build: Callable[..., Pictures]) -> None:
    make(folder, 1)
    (folder / "0.png").write_text("x")
    with pytest.raises(ValueError, match="None of the 1 pictures"):
        build(skip_unreadable=True)


def test_decompression_bombs_are_named(
    folder: Path, build: Callable[..., Pictures], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder)
    paint(folder / "1.png", 1, (30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(ValueError, match=r"1\.png .*cannot be read: Image size \(900 pixels\) exceeds limit"):
        build(size=8)


# Metadata that cannot be used


def test_no_folder_no_metadata_two_metadata(folder: Path, build: Callable[..., Pictures]) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        build()
    make(folder)
    (folder / "metadata.jsonl").rename(folder / "captions.jsonl")
    with pytest.raises(ValueError, match=r"no metadata file\. Add metadata\.jsonl, metadata\.csv or metadata\.parquet"):
        build()
    make(folder)
    make(folder, kind="csv")
    with pytest.raises(ValueError, match=r"2 metadata files \('metadata\.jsonl', 'metadata\.csv'\)\. Keep one"):
        build()


def test_metadata_above_and_below(folder: Path, build: Callable[..., Pictures]) -> None:
    make(folder)
    make(folder / "train")
    with pytest.raises(ValueError, match=r"holds a metadata file and so do its subfolders .*train/metadata\.jsonl"):
        build()
    (folder / "train").rename(folder / "val")
    with pytest.raises(ValueError, match=r"val/metadata\.jsonl would not be read: .*train, validation, test below it"):
        build()


def test_pictures_that_no_metadata_names(folder: Path, build: Callable[..., Pictures]) -> None:
    make(folder)
    for index in range(6):
        paint(folder / "more" / f"{index}.JPG", index)
    with pytest.raises(
        ValueError, match=r"holds 6 pictures that no metadata names: 'more/0\.JPG'.*, …\. Add a row for each"
    ):
        build()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ""}, r"line 2: the caption \('text'\) is missing"),
        ({"text": " \n"}, r"line 2: the caption \('text'\) is missing"),
        ({"text": None}, r"line 2: the caption \('text'\) is missing"),
        ({"text": float("nan")}, r"line 2: the caption \('text'\) is missing"),
        ({"text": []}, r"line 2: the caption \('text'\) is missing"),
        ({"text": ["x", ""]}, r"line 2: the caption \('text'\) is missing"),
        ({"text": {"en": "x"}}, r"line 2: 'text' holds a dict, not text"),
        ({"text": ["x", ["y"]]}, r"line 2: 'text' holds a list, not text"),
        ({"text": ["x", "y"]}, r"line 2: the picture has 2 captions, but that of .*line 1 has 1"),
        ({"text": "\ud83d"}, r"line 2: 'text' holds half a surrogate pair"),
        ({"file_name": None}, r"line 2: 'file_name' is missing"),
        ({"file_name": "nosuch.png"}, r"line 2: there is no file 'nosuch\.png' in .*Add the picture or remove the row"),
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
        ({"id": None}, r"line 2: the id None is not one"),
        ({"id": " "}, r"line 2: the id ' ' is not one"),
        ({"id": 1.0}, r"line 2: the id 1\.0 is not one"),
        ({"id": "0.png"}, r"line 1 and .*line 2 have the same id '0\.png'"),
        ({"file_name": "./0.png"}, r"line 1 and .*line 2 have the same id '0\.png'.* as a list"),
        ({"split": "train"}, r"line 1: the split is missing, while other pictures have one"),
        ({"split": "dev"}, r"line 2: the split 'dev' is not one of train, validation, test"),
    ],
)
def test_bad_rows(
    tmp_path: Path, folder: Path, build: Callable[..., Pictures], change: dict[str, Any], message: str
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


def test_links_within_the_folder_are_followed(folder: Path, build: Callable[..., Pictures]) -> None:
    rows = make(folder, 1)
    (folder / "1.png").symlink_to("0.png")
    write_metadata(folder, [rows[0], {"file_name": "1.png", "text": "x"}])
    pictures = build()
    np.testing.assert_array_equal(pictures.pixels[0], pictures.pixels[1])


def test_either_all_pictures_have_an_id_or_none(folder: Path, build: Callable[..., Pictures]) -> None:
    rows = make(folder)
    write_metadata(folder, [{**rows[0], "id": "x"}, *rows[1:]])
    with pytest.raises(ValueError, match="line 2: the id None is not one"):
        build()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("column", ["file_name", "text"])
def test_missing_columns(folder: Path, build: Callable[..., Pictures], kind: str, column: str) -> None:
    make(folder, kind=kind)
    other = "file_name" if column == "text" else "text"
    write_metadata(folder, [{other: "0.png", "more": "x"}], kind)
    present = ", ".join(sorted((f"'{other}'", "'more'")))
    with pytest.raises(ValueError, match=rf"metadata\.{kind} has no column '{column}', only {present}\. Add"):
        build()


def test_a_wanted_column_that_is_not_there(folder: Path, build: Callable[..., Pictures]) -> None:
    make(folder)
    with pytest.raises(ValueError, match="has no column 'artist', only 'file_name', 'text'"):
        build(columns=("artist",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b"", "lists no picture"),
        ("metadata.jsonl", b'\n\n{"file_name": "0.png"', r"line 3 is not valid JSON"),
        ("metadata.jsonl", b'["0.png", "x"]', r"line 1 is not a JSON object"),
        ("metadata.jsonl", b"[" * 200_000, r"line 1 is not valid JSON"),
        ("metadata.jsonl", b'{"file_name": "\xff"}', r"metadata\.jsonl is not UTF-8"),
        ("metadata.csv", b"", "lists no picture"),
        ("metadata.csv", b"file_name,text\n", "lists no picture"),
        ("metadata.csv", b"file_name,text\n0.png,red, round\n", "line 2 has 3 cells, but the header names 2"),
        ("metadata.csv", b"file_name,text\n0.png\n", "line 2 has 1 cells, but the header names 2"),
        ("metadata.csv", b'file_name,text\n0.png,"x\n', "is not valid CSV"),
        ("metadata.csv", b"file_name,text,text\n0.png,x,y\n", "two columns have the same name"),
        ("metadata.csv", b"file_name,text\n0.png,\xff\n", r"metadata\.csv is not UTF-8"),
        ("metadata.parquet", b"PAR1 not really", "is not a readable parquet file"),
        ("metadata.parquet", b"", "is not a readable parquet file"),
    ],
)
def test_broken_metadata(folder: Path, build: Callable[..., Pictures], name: str, content: bytes, message: str) -> None:
    paint(folder / "0.png", 0)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_byte_order_mark_is_not_part_of_the_first_column(
    folder: Path, build: Callable[..., Pictures], kind: str
) -> None:
    make(folder, kind=kind)
    path = folder / f"metadata.{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(build()) == 3


# Data module


def test_data_module_trains_on_what_is_neither_held_out_nor_excluded(tmp_path: Path, folder: Path) -> None:
    rows = make(folder, 6)
    write_metadata(folder, [{**row, "split": "train" if i < 4 else "validation"} for i, row in enumerate(rows)])
    (tmp_path / "exclude.txt").write_text("2.png\n")
    data = ImageFolder(str(folder), store=str(tmp_path / "store"), exclude=str(tmp_path / "exclude.txt"), batch_size=2)
    data.prepare_data()
    data.setup()
    assert data.train_pictures.ids == ("0.png", "1.png", "3.png")
    assert data.validation_pictures.ids == ("4.png", "5.png")
    (batch,) = data.val_dataloader()
    seen = {tuple(pixels.flatten().tolist()) for pixels in batch.pixels}
    held = np.moveaxis(data.validation_pictures.pixels, -1, 1).astype(np.float32) / np.float32(127.5) - 1
    assert seen == {tuple(pixels.flatten().tolist()) for pixels in held}
    with pytest.raises(ValueError, match=r"'nosuch'; its ids look like '0\.png'"):
        ImageFolder(str(folder), store=str(tmp_path / "store"), exclude=["nosuch"]).setup()


def test_data_module_holds_a_share_out(tmp_path: Path, folder: Path) -> None:
    make(folder, 6)
    data = ImageFolder(str(folder), validation_share=0.5, store=str(tmp_path / "store"))
    train, validation = data.load()
    expected = split_pictures(build_image_folder(Store(tmp_path / "store"), folder), 0.5)
    assert (train.ids, validation.ids) == (expected[0].ids, expected[1].ids)
    assert len(train) + len(validation) == 6
