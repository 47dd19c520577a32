"""A folder of captioned images: pixels, cache, unreadable images, splits and the data module."""

from __future__ import annotations

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
import pytest
from PIL import Image

from datamodules import ImageFolder
from tests.support.folders import make, paint, write_metadata
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder, load_image, split_images
from wherefrom.data.image_set import ImageSet
from wherefrom.runtime.artifacts import StorageError, Store, read_manifest


@pytest.mark.parametrize(
    ("size", "across", "down"), [((9, 4), slice(2, 6), slice(0, 4)), ((4, 7), slice(0, 4), slice(1, 5))]
)
def test_the_centre_is_cut_out(tmp_path: Path, size: tuple[int, int], across: slice, down: slice) -> None:
    pixels = paint(tmp_path / "x.png", 0, size)
    np.testing.assert_array_equal(load_image(tmp_path / "x.png", 4), pixels[down, across])
    np.testing.assert_array_equal(load_image(tmp_path / "x.png", None), pixels)


def test_reducing_averages(tmp_path: Path) -> None:
    fine = (
        np.indices((64, 64)).sum(0) % 2 * 200
    )  # a checkerboard of 0 and 200; taking every eighth pixel would give one
    Image.fromarray(fine.astype(np.uint8)).save(tmp_path / "x.png")
    assert np.abs(load_image(tmp_path / "x.png", 8).astype(int) - 100).max() <= 4


def test_transparency_is_put_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 51, 255
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert load_image(tmp_path / "rgba.png", None)[0, :, 0].tolist() == [255, 204, 0]
    Image.fromarray(rgba[:, :, 2:]).save(tmp_path / "la.png")
    assert load_image(tmp_path / "la.png", None)[0, :, 0].tolist() == [255, 204, 0]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    assert load_image(tmp_path / "p.png", None)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


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
def test_images_stand_upright(tmp_path: Path, orientation: int, upright: Callable[[np.ndarray], np.ndarray]) -> None:
    pixels = paint(tmp_path / "x.png", 0, (5, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "x.png", None), upright(pixels))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png", None)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_pixels_have_no_white(folder: Path, build: Callable[..., ImageSet]) -> None:
    make(folder, 1)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "x.tif")
    write_metadata(folder, [{"file_name": name, "text": "x"} for name in ("0.png", "x.tif")])
    with pytest.raises(ValueError, match=r"x\.tif .*mode 'F' have no defined white level"):
        build()


def test_formats_that_run_programs_are_not_opened(folder: Path, build: Callable[..., ImageSet]) -> None:
    make(folder, 1)
    Image.new("RGB", (8, 8)).save(folder / "0.png", format="EPS")
    with pytest.raises(ValueError, match=r"0\.png .*cannot be read: cannot identify"):
        build()


def test_one_size_is_asked_for(folder: Path, build: Callable[..., ImageSet]) -> None:
    make(folder)
    paint(folder / "1.png", 1, (9, 8))
    with pytest.raises(
        ValueError, match=r"1\.png has the wrong size: 9x8 pixels, while '0\.png' has 8x8\. Set the option"
    ):
        build()
    assert build(size=4).pixels.shape == (3, 4, 4, 3)
    with pytest.raises(ValueError, match="size 0 is not"):
        build(size=0)


def test_images_of_one_size_need_not_be_square(folder: Path, build: Callable[..., ImageSet]) -> None:
    make(folder, 1)
    pixels = paint(folder / "0.png", 1, (9, 5))
    np.testing.assert_array_equal(build().pixels[0], pixels)


def test_the_store_is_used_and_never_stale(tmp_path: Path, folder: Path) -> None:
    store, drawn = Store(tmp_path / "store"), []

    def build(place: Path, **options: Any) -> ImageSet:
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


def test_pixels_are_not_held_in_memory(folder: Path, build: Callable[..., ImageSet]) -> None:
    count, size = 60, 160
    folder.mkdir()
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    write_metadata(folder, [{"file_name": "one.png", "text": "x", "id": str(index)} for index in range(count)])
    build(size=2)
    tracemalloc.start()
    try:
        images = build(size=size)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < images.pixels.nbytes / 4
    assert (images.pixels == (255, 0, 0)).all()


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_a_storage_error(folder: Path, build: Callable[..., ImageSet]) -> None:
    make(folder)
    earlier = build()
    with full_disk(100_000), pytest.raises(StorageError, match=r"Cannot write .*pixels\.npy: File too large"):
        build(size=150)
    assert build().fingerprint == earlier.fingerprint
    assert build(size=150).pixels.shape == (3, 150, 150, 3)


def spoil(folder: Path) -> list[str]:
    """Cuts one image short, replaces one by text, and empties one."""
    make(folder, 5)
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "2.png").write_text("not an image")
    (folder / "4.png").write_bytes(b"")
    return ["1.png", "2.png", "4.png"]


def test_unreadable_images_are_named(folder: Path, build: Callable[..., ImageSet]) -> None:
    spoil(folder)
    with pytest.raises(
        ValueError,
        match=r"^2 of 5 images .*headers.*: 2\.png \(.*metadata\.jsonl, line 3\) cannot be read: .*; 4\.png \(.*line 5"
        r".*on_error: skip",
    ):
        build()
    for name in ("2.png", "4.png"):
        paint(folder / name, 0)
    with pytest.raises(ValueError, match=r"1\.png \(.*line 2\) cannot be read: .*number 2 of 5; .*on_error: skip"):
        build()
    paint(folder / "1.png", 0)
    assert len(build()) == 5


def test_unreadable_images_are_skipped_if_asked_and_counted(
    tmp_path: Path, folder: Path, build: Callable[..., ImageSet], caplog: pytest.LogCaptureFixture
) -> None:
    spoiled = spoil(folder)
    for _ in range(2):  # built, then found in the store
        with caplog.at_level(logging.WARNING):
            images = build(on_error="skip")
        assert "skipped 3 of 5 images that cannot be read: '1.png', '2.png', '4.png'" in caplog.text
        caplog.clear()
    assert images.ids == ("0.png", "3.png")
    expected = np.stack([np.asarray(Image.open(folder / name)) for name in images.ids])
    np.testing.assert_array_equal(images.pixels, expected)
    (made,) = (tmp_path / "store" / "image_folder").iterdir()
    assert read_manifest(made)["skipped"] == spoiled == list(read_manifest(made)["reasons"]) == list(images.skipped)
    with pytest.raises(ValueError, match=r"2\.png"):
        build()


def test_a_folder_without_any_readable_image(folder: Path, build: Callable[..., ImageSet]) -> None:
    make(folder, 1)
    (folder / "0.png").write_text("x")
    with pytest.raises(ValueError, match="None of the 1 images"):
        build(on_error="skip")


def test_decompression_bombs_are_named(
    folder: Path, build: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder)
    paint(folder / "1.png", 1, (30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(ValueError, match=r"1\.png .*cannot be read: Image size \(900 pixels\) exceeds limit"):
        build(size=8)


def unsplit(count: int, **columns: tuple[str, ...]) -> ImageSet:
    ids = tuple(f"{index}.png" for index in range(count))
    return ImageSet(ids, (("x",),) * count, np.zeros((count, 1, 1, 3), np.uint8), columns)


def test_a_share_is_held_out_by_id() -> None:
    train, validation = split_images(unsplit(4000), 0.05)
    assert abs(len(validation) - 200) < 4 * math.sqrt(4000 * 0.05 * 0.95)
    assert sorted(train.ids + validation.ids) == sorted(unsplit(4000).ids)
    fewer = unsplit(4000).subset(range(0, 4000, 3))
    assert set(split_images(fewer, 0.05)[1].ids) == set(validation.ids) & set(fewer.ids)
    assert set(validation.ids) < set(split_images(unsplit(4000), 0.1)[1].ids)


def test_a_share_is_taken_from_training_images_only() -> None:
    split = tuple("test" if index % 2 else "train" for index in range(400))
    train, validation = split_images(unsplit(400, split=split), 0.3)
    assert len(train) + len(validation) == 200
    assert set(validation.columns["split"]) == {"train"}


@pytest.mark.parametrize(("split", "share"), [("train", 1e-9), ("train", 1.0), ("validation", 0.1), ("test", 0.1)])
def test_both_splits_need_images(split: str, share: float) -> None:
    with pytest.raises(ValueError, match=r"Of 5 images, \d are for training and \d for validation.*validation_share"):
        split_images(unsplit(5, split=(split,) * 5), share)


@pytest.mark.parametrize("share", [None, 0.0])
def test_nothing_is_held_out_unless_a_share_is_asked_for(share: float | None) -> None:
    for images in (unsplit(200), unsplit(200, split=("train",) * 200)):
        train, validation = split_images(images, share)
        assert (train.ids, len(validation)) == (images.ids, 0)


def test_data_module_trains_on_what_is_neither_held_out_nor_excluded(tmp_path: Path, folder: Path) -> None:
    rows = make(folder, 6)
    write_metadata(folder, [{**row, "split": "train" if i < 4 else "validation"} for i, row in enumerate(rows)])
    (tmp_path / "exclude.txt").write_text("2.png\n")
    data = ImageFolder(str(folder), store=str(tmp_path / "store"), exclude=str(tmp_path / "exclude.txt"), batch_size=2)
    data.prepare_data()
    data.setup()
    assert data.train_images.ids == ("0.png", "1.png", "3.png")
    assert data.validation_images.ids == ("4.png", "5.png")
    (batch,) = data.val_dataloader()
    seen = {tuple(pixels.flatten().tolist()) for pixels in batch.pixels}
    held = np.moveaxis(data.validation_images.pixels, -1, 1).astype(np.float32) / np.float32(127.5) - 1
    assert seen == {tuple(pixels.flatten().tolist()) for pixels in held}
    with pytest.raises(ValueError, match=r"'nosuch'; its ids look like '0\.png'"):
        ImageFolder(str(folder), store=str(tmp_path / "store"), exclude=["nosuch"]).setup()


def test_data_module_holds_a_share_out(tmp_path: Path, folder: Path) -> None:
    make(folder, 6)
    data = ImageFolder(str(folder), validation_share=0.5, store=str(tmp_path / "store"))
    train, validation = data.load()
    expected = split_images(build_image_folder(Store(tmp_path / "store"), folder), 0.5)
    assert (train.ids, validation.ids) == (expected[0].ids, expected[1].ids)
    assert len(train) + len(validation) == 6
