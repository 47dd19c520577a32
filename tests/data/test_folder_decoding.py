"""A folder that is read: headers first, nothing decoded twice, and images of several sizes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.folders import make, paint, write_metadata
from wherefrom.data import folder_decoding
from wherefrom.data.aspect_buckets import Buckets
from wherefrom.data.framing import Framing
from wherefrom.data.image_files import load_image
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder
from wherefrom.data.image_set import ImageSet
from wherefrom.data.mscoco import CocoOptions
from wherefrom.data.on_error import reading_identity
from wherefrom.data.ragged_pixels import RaggedPixels
from wherefrom.data.webdataset import ShardOptions
from wherefrom.runtime.artifacts import Store, read_manifest
from wherefrom.runtime.stable_names import settings_identity

Build = Callable[..., ImageSet]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded."""
    seen: list[str] = []

    def load(source: Any, *options: Any) -> Any:
        seen.append(source.name)
        return load_image(source, *options)

    monkeypatch.setattr(folder_decoding, "load_image", load)
    return seen


def cut_short(path: Path) -> bytes:
    """Leaves the header and some rows."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return whole


def test_nothing_is_decoded_where_headers_are_bad(folder: Path, build: Build, loaded: list[str]) -> None:
    make(folder, 9)
    for number in (2, 3, 4, 5, 6, 8):
        (folder / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^6 of 9 images .*2\.png \(.*line 3\) cannot.*6\.png.*; and 1 more\. Repair"):
        build(size=4)
    assert loaded == []
    assert build(size=4, on_error="skip").ids == ("0.png", "1.png", "7.png")


def test_another_size_is_found_before_anything_is_decoded(folder: Path, build: Build, loaded: list[str]) -> None:
    make(folder, 4)
    for number in (1, 3):
        paint(folder / f"{number}.png", number, (9, 8))
    with pytest.raises(ValueError, match=r"1\.png and 1 more has the wrong size: 9x8 pixels, while '0\.png' has 8x8"):
        build()
    assert loaded == []


def test_a_damaged_image_costs_only_itself(folder: Path, build: Build, loaded: list[str]) -> None:
    make(folder, 5)
    whole = cut_short(folder / "3.png")
    with pytest.raises(ValueError, match=r"3\.png .* number 4 of 5; those before it are kept"):
        build(size=4)
    assert loaded == ["0.png", "1.png", "2.png", "3.png"]
    loaded.clear()
    (folder / "3.png").write_bytes(whole)
    made = build(size=4)
    assert loaded == ["3.png", "4.png"]
    np.testing.assert_array_equal(made.pixels, np.stack([load_image(folder / f"{n}.png", 4) for n in range(5)]))


def test_what_was_decoded_is_kept_where_images_come_and_go(
    tmp_path: Path, folder: Path, build: Build, loaded: list[str]
) -> None:
    rows = make(folder, 6)
    cut_short(folder / "5.png")
    with pytest.raises(ValueError, match=r"5\.png"):
        build(size=4)
    loaded.clear()
    (folder / "5.png").unlink()
    (folder / "1.png").unlink()
    paint(folder / "a.png", 7)
    added = {"file_name": "a.png", "text": "new", "id": "0.png+"}
    write_metadata(folder, [added, *({**rows[n], "id": f"{n}.png"} for n in (4, 0, 2, 3))])
    made = build(size=4)
    assert loaded == ["a.png"]
    assert made.ids == ("0.png", "0.png+", "2.png", "3.png", "4.png")
    expected = np.stack([load_image(folder / f"{name}.png", 4) for name in ("0", "a", "2", "3", "4")])
    np.testing.assert_array_equal(made.pixels, expected)
    clean = build_image_folder(Store(tmp_path / "other"), folder, ImageFolderOptions(size=4))
    assert made.fingerprint == clean.fingerprint
    assert not any((tmp_path / "store" / "image_folder_decoding").iterdir()), "nothing is left over"


def _killed_after(folder: Path, store: Path, count: int) -> None:
    """Reads a folder, and ends without any farewell after so many images were made safe."""
    import wherefrom.data.decoded_pixels as decoded_pixels

    decoded_pixels._IMAGES = 2

    def progress(done: int, _: int) -> None:
        if done == count:
            os._exit(9)

    build_image_folder(Store(store), folder, ImageFolderOptions(size=4), progress)


def test_a_killed_reading_goes_on(tmp_path: Path, folder: Path, build: Build, loaded: list[str]) -> None:
    make(folder, 8)
    process = multiprocessing.get_context("fork").Process(target=_killed_after, args=(folder, tmp_path / "store", 5))
    process.start()
    process.join()
    assert process.exitcode == 9
    made = build(size=4)
    assert loaded == ["4.png", "5.png", "6.png", "7.png"], "four were safe, the fifth was not yet"
    clean = build_image_folder(Store(tmp_path / "other"), folder, ImageFolderOptions(size=4))
    assert made.fingerprint == clean.fingerprint
    np.testing.assert_array_equal(made.pixels, clean.pixels)


def test_pixels_that_vanished_are_decoded_again(tmp_path: Path, folder: Path, build: Build, loaded: list[str]) -> None:
    make(folder, 3)
    whole = cut_short(folder / "2.png")
    with pytest.raises(ValueError, match=r"2\.png"):
        build(size=4)
    (work,) = (tmp_path / "store" / "image_folder_decoding").iterdir()
    (work / "pixels-4x4.npy").unlink()
    (folder / "2.png").write_bytes(whole)
    loaded.clear()
    np.testing.assert_array_equal(
        build(size=4).pixels, np.stack([load_image(folder / f"{n}.png", 4) for n in range(3)])
    )
    assert loaded == ["0.png", "1.png", "2.png"]


def test_one_image_under_several_ids(folder: Path, build: Build) -> None:
    make(folder, 2)
    rows = [{"file_name": f"{n % 2}.png", "text": "x", "id": str(n)} for n in range(5)]
    write_metadata(folder, rows)
    np.testing.assert_array_equal(
        build(size=4).pixels, np.stack([load_image(folder / f"{n % 2}.png", 4) for n in range(5)])
    )


def test_images_that_are_skipped_are_listed_with_the_reason(tmp_path: Path, folder: Path, build: Build) -> None:
    make(folder, 4)
    cut_short(folder / "1.png")
    (folder / "2.png").write_bytes(b"")
    made = build(on_error="skip")
    assert made.skipped == ("1.png", "2.png")
    assert made.subset([0]).skipped == made.skipped
    (artifact,) = (tmp_path / "store" / "image_folder").iterdir()
    reasons = read_manifest(artifact)["reasons"]
    assert "truncated" in reasons["1.png"] or "broken" in reasons["1.png"]
    assert "cannot identify" in reasons["2.png"]


BUCKETS = Framing(buckets=Buckets(8, 4, 16, 2))
SHAPES = [(30, 20), (16, 16), (20, 30), (9, 9), (40, 20), (31, 20)]  # width, height


def bucketed(folder: Path) -> None:
    rows = make(folder, len(SHAPES))
    for number, size in enumerate(SHAPES):
        paint(folder / f"{number}.png", number, size)
    write_metadata(folder, rows)


def test_every_image_is_in_the_bucket_nearest_to_it(tmp_path: Path, folder: Path, build: Build) -> None:
    bucketed(folder)
    made = build(size=8, framing=BUCKETS)
    assert isinstance(made.pixels, RaggedPixels)
    assert len(set(made.sizes)) >= 3
    for number in range(len(SHAPES)):
        np.testing.assert_array_equal(made.pixels[number], load_image(folder / f"{number}.png", 8, BUCKETS))
    again = build(size=8, framing=BUCKETS)
    assert (again.fingerprint, again.sizes) == (made.fingerprint, made.sizes)
    assert build(size=8).fingerprint != made.fingerprint
    assert len(list((tmp_path / "store" / "image_folder").iterdir())) == 2


def test_images_of_one_bucket_are_a_set_of_that_size(folder: Path, build: Build) -> None:
    make(folder, 3)
    square = build(size=8, framing=BUCKETS)
    assert square.pixels.shape == (3, 8, 8, 3)
    assert square.fingerprint == build(size=8).fingerprint, "the content is the same"


def test_buckets_go_on_after_an_interruption_too(tmp_path: Path, folder: Path, build: Build, loaded: list[str]) -> None:
    bucketed(folder)
    whole = cut_short(folder / "4.png")
    with pytest.raises(ValueError, match=r"4\.png"):
        build(size=8, framing=BUCKETS)
    (folder / "4.png").write_bytes(whole)
    loaded.clear()
    made = build(size=8, framing=BUCKETS)
    assert loaded == ["4.png", "5.png"]
    clean = build_image_folder(Store(tmp_path / "other"), folder, ImageFolderOptions(size=8, framing=BUCKETS))
    assert made.fingerprint == clean.fingerprint


def test_too_small_images_are_named_by_their_headers(folder: Path, build: Build, loaded: list[str]) -> None:
    bucketed(folder)
    paint(folder / "3.png", 3, (1, 9))
    with pytest.raises(ValueError, match=r"3\.png .*9 pixels is smaller than a bucket's step"):
        build(size=8, framing=Framing(buckets=Buckets(8, 4, 16, 2, upscale=False)))
    assert loaded == []


def test_identities_are_those_of_before() -> None:
    before = {"size": 512, "caption": "text", "columns": None, "skip_unreadable": False}
    assert reading_identity(ImageFolderOptions(512, "text")) == before
    assert reading_identity(ImageFolderOptions((512, 512), "text")) == before
    assert reading_identity(ImageFolderOptions(512, "text", on_error="skip")) == {**before, "skip_unreadable": True}
    assert reading_identity(ImageFolderOptions(512, framing=Framing(fit="pad")))["framing"] == {"fit": "pad"}
    coco = {"size": 128, "captions": 5, "skip_unreadable": False, "workers": 1}
    assert reading_identity(CocoOptions(128)) == coco
    shards = {"size": 512, "columns": ("url",), "license": None, "largest_member": 2**26, "workers": 1}
    assert settings_identity(ShardOptions(512)) == {**shards, "on_error": "skip"}


@pytest.mark.parametrize("kind", [ImageFolderOptions, CocoOptions])
def test_the_old_name_of_skipping_is_taken_with_a_warning(kind: Any) -> None:
    with pytest.warns(DeprecationWarning, match="skip_unreadable=True is now on_error='skip'"):
        assert kind(size=8, skip_unreadable=True) == kind(size=8, on_error="skip")
    with pytest.raises(ValueError, match="on_error is one of stop, skip; given 'ignore'"):
        kind(on_error="ignore")


def test_gray_and_small_formats_have_headers_too(folder: Path, build: Build) -> None:
    make(folder, 1)
    Image.new("L", (8, 8), 7).save(folder / "g.gif")
    Image.new("1", (8, 8), 1).save(folder / "b.bmp")
    write_metadata(folder, [{"file_name": name, "text": "x"} for name in ("0.png", "b.bmp", "g.gif")])
    assert build().pixels[:, 0, 0, 0].tolist()[1:] == [255, 7]
