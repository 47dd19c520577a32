"""Images in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wherefrom.data.image_set import (
    PIXELS,
    ImageSet,
    keep_indices,
    read_ids,
    read_image_set,
    write_image_set,
    write_pixels_header,
)
from wherefrom.runtime.artifacts import write_manifest


def some(count: int = 5) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)
    return ImageSet(
        ids=tuple(f"set/{index}" for index in range(count)),
        captions=tuple((f"a {index}", f"b <b>{index}</b>\n\0é") for index in range(count)),
        pixels=pixels,
        columns={"license": ("x", "y", "x", "y", "x")[:count], "style": tuple("abcde"[:count])},
        fingerprint="f",
    )


def test_duplicate_ids_are_named() -> None:
    with pytest.raises(ValueError, match=r"2 image ids occur more than once: 'a', 'b'\."):
        ImageSet(tuple("abcabb"), (("x",),) * 6, np.zeros((6, 1, 1, 3), np.uint8))


def test_caption_counts_must_agree() -> None:
    with pytest.raises(ValueError, match=r"equally many captions each; found \[1, 2\]"):
        ImageSet(("a", "b"), (("x",), ("x", "y")), np.zeros((2, 1, 1, 3), np.uint8))


def test_subset_takes_everything_of_an_image_along() -> None:
    images = some()
    part = images.subset([3, 0])
    assert part.ids == ("set/3", "set/0")
    assert part.captions == (images.captions[3], images.captions[0])
    assert part.columns == {"license": ("y", "x"), "style": ("d", "a")}
    np.testing.assert_array_equal(part.pixels, images.pixels[[3, 0]])
    assert len(images.subset([])) == 0


def test_where_selects_by_column() -> None:
    assert some().where("license", "y").ids == ("set/1", "set/3")
    assert len(some().where("license", "z")) == 0


def test_what_is_written_is_read(tmp_path: Path) -> None:
    images = some()
    write_image_set(tmp_path, images.ids, images.captions, images.pixels, images.columns)
    with pytest.raises(FileNotFoundError, match="not an artifact"):
        read_image_set(tmp_path)
    write_manifest(tmp_path, {}, fingerprint="f")
    read = read_image_set(tmp_path)
    assert (read.ids, read.captions, read.columns) == (images.ids, images.captions, images.columns)
    assert read.fingerprint == "f"
    assert isinstance(read.pixels, np.memmap)
    np.testing.assert_array_equal(read.pixels, images.pixels)


def test_pixels_that_are_not_contiguous_are_written_in_order(tmp_path: Path) -> None:
    images = some()
    write_image_set(tmp_path, images.ids, images.captions, images.pixels[:, :, ::-1], {})
    np.testing.assert_array_equal(np.load(tmp_path / PIXELS), images.pixels[:, :, ::-1])


def test_the_head_of_the_pixels_has_one_length_for_any_count(tmp_path: Path) -> None:
    lengths = set()
    for count in (1, 999, 10**12):
        with (tmp_path / "head").open("wb") as stream:
            write_pixels_header(stream, (count, 512, 512, 3))
            lengths.add(stream.tell())
    assert len(lengths) == 1


def test_a_column_may_not_take_the_place_of_the_tables_own(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_image_set(tmp_path, ["a"], [["x"]], np.zeros((1, 1, 1, 3), np.uint8), {"captions": ["y"]})


def test_read_ids(tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    path.write_text("\n set/é \r\nset/2\n\n", encoding="utf-8")
    assert read_ids(path) == read_ids(str(path)) == read_ids(["set/é", "set/2"]) == ("set/é", "set/2")
    assert read_ids(None) == ()
    with pytest.raises(ValueError, match=r"nosuch is not a file\. Give a list of ids, or a text file"):
        read_ids(tmp_path / "nosuch")


def test_keep_indices() -> None:
    assert keep_indices(("a", "b", "c"), ()) == [0, 1, 2]
    assert keep_indices(("a", "b", "c"), ("c", "a", "a")) == [1]
    with pytest.raises(ValueError, match=r"names 2 ids .* such as 'x'; its ids look like 'a'"):
        keep_indices(("a", "b"), ("y", "a", "x"))
    with pytest.raises(ValueError, match="it is empty"):
        keep_indices((), ("a",))
