"""Each layout gives the ids, captions, splits and repeats that its trainer sees, and refuses what leads out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder
from wherefrom.data.layouts.base import ReadingOptions, Row
from wherefrom.data.layouts.detection import LAYOUTS, OpenedImages, open_images
from wherefrom.runtime.artifacts import Store


def paint(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(path)
    return path


def beside(path: Path, text: str | bytes, suffix: str = ".txt", shade: int = 0) -> None:
    paint(path, shade)
    content = text if isinstance(text, bytes) else text.encode()
    path.with_suffix(suffix).write_bytes(content)


def captions(opened: OpenedImages) -> dict[str, tuple[str, ...]]:
    return {row.id: row.captions for row in opened.reader.rows}


def row_of(opened: OpenedImages, name: str) -> Row:
    return next(row for row in opened.reader.rows if row.id == name)


def told(opened: OpenedImages) -> str:
    return "\n".join(opened.lines)


def test_sidecars(tmp_path: Path) -> None:
    beside(tmp_path / "a.jpg", "a red bus\n")
    beside(tmp_path / "b.png", b"\xef\xbb\xbfone\r\n\r\ntwo \r\n", ".caption")
    beside(tmp_path / "sub/c.webp", "")
    paint(tmp_path / "d.png")
    paint(tmp_path / "a-masklabel.png")
    (tmp_path / "e.heic").write_bytes(b"")
    (tmp_path / "alone.txt").write_text("x")
    opened = open_images(tmp_path)
    assert opened.reader.layout == "sidecar"
    assert captions(opened) == {
        "a.jpg": ("a red bus",) * 2,
        "b.png": ("one", "two"),
        "d.png": ("",) * 2,
        "sub/c.webp": ("",) * 2,
    }
    for words in (
        "1 image of 4 without a caption file",
        "'a-masklabel.png'",
        "'e.heic'",
        "'alone.txt'",
        "of several lines",
    ):
        assert words in told(opened)
    first = open_images(tmp_path, ReadingOptions(caption_lines="first"))
    assert captions(first)["b.png"] == ("one",)
    assert captions(open_images(tmp_path, ReadingOptions(caption_lines="whole")))["b.png"] == ("one two",)


def test_splits_of_sidecars(tmp_path: Path) -> None:
    beside(tmp_path / "Train/a.png", "a")
    beside(tmp_path / "val/b.png", "b")
    assert {row.id: row.split for row in open_images(tmp_path).reader.rows} == {
        "Train/a.png": "train",
        "val/b.png": "validation",
    }
    beside(tmp_path / "c.png", "c")
    with pytest.raises(ValueError, match="their split is in doubt"):
        open_images(tmp_path)


def test_the_trigger_of_ai_toolkit(tmp_path: Path) -> None:
    beside(tmp_path / "a.png", "[trigger] on a hill")
    with pytest.raises(ValueError, match=r"a\.png: the caption holds '\[trigger\]'.*option 'trigger'"):
        open_images(tmp_path)
    assert captions(open_images(tmp_path, ReadingOptions(trigger="sks"))) == {"a.png": ("sks on a hill",)}


def test_kohyas_folders(tmp_path: Path) -> None:
    beside(tmp_path / "10_blue cat/a.png", "a cat\nanother line")
    paint(tmp_path / "10_blue cat/b.png", 1)
    paint(tmp_path / "2_dog/c.png", 2)
    opened = open_images(tmp_path)
    assert opened.reader.layout == "kohya"
    assert {row.id: (row.captions, row.repeats) for row in opened.reader.rows} == {
        "10_blue cat/a.png": (("a cat",), 10),
        "10_blue cat/b.png": (("blue cat",), 10),
        "2_dog/c.png": (("dog",), 2),
    }
    images = build_image_folder(Store(tmp_path / "store"), opened, ImageFolderOptions(8))
    assert images.columns["repeats"] == ("10", "10", "2")
    paint(tmp_path / "more/d.png")
    with pytest.raises(ValueError, match=r"kohya's trainer does not see them: 'more/d\.png'"):
        open_images(tmp_path)


CONFIG = """
[general]
caption_extension = ".txt"
shuffle_caption = true
resolution = 512
[[datasets]]
resolution = 768
  [[datasets.subsets]]
  image_dir = "cats"
  num_repeats = 3
  caption_prefix = "photo of"
  [[datasets.subsets]]
  image_dir = "reg"
  is_reg = true
  class_tokens = "thing"
  num_repeats = 2
  [[datasets.subsets]]
  image_dir = "cats"
[[datasets]]
  [[datasets.subsets]]
  image_dir = "cats"
  caption_prefix = "photo of"
"""


def test_a_configuration_of_kohyas(tmp_path: Path) -> None:
    """Repeats of regularization images as in sd-scripts: with their own until there are enough, then one more each."""
    beside(tmp_path / "cats/a.png", "a cat")
    beside(tmp_path / "cats/b.png", "b cat", shade=1)
    for index in range(3):
        paint(tmp_path / f"reg/{index}.png", 2 + index)
    (tmp_path / "set.toml").write_text(CONFIG)
    opened = open_images(tmp_path / "set.toml")
    rows = {row.id: (row.captions, row.repeats, row.columns["is_reg"]) for row in opened.reader.rows}
    # Six images with repeats in the first data set and two in the second: eight.
    assert rows == {
        "cats/a.png": (("photo of a cat",), 4, "false"),
        "cats/b.png": (("photo of b cat",), 4, "false"),
        "reg/0.png": (("thing",), 3, "true"),
        "reg/1.png": (("thing",), 3, "true"),
        "reg/2.png": (("thing",), 2, "true"),
    }
    for words in ("shuffle_caption = True", "resolution = 512", "earlier one", "without a .txt file"):
        assert words in told(opened)
    for line, message in (
        ('conditioning_data_dir = "x"', "conditioning_data_dir is not supported"),
        ("num_repeats = -1", "num_repeats is -1"),
        ('image_dir = "nowhere"', "there is no 'nowhere'"),
        ("[broken", "is not valid TOML"),
    ):
        (tmp_path / "bad.toml").write_text(
            f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\n{line}\n'.replace(
                'image_dir = "cats"\nimage_dir', "image_dir"
            )
        )
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / "bad.toml")


def test_a_list_of_kohyas_and_of_musubi(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    paint(tmp_path / "sub/b.jpg")
    content = {
        "a": {"caption": "a cat", "tags": "cat, blue", "train_resolution": [8, 8]},
        str(tmp_path / "sub/b.jpg"): {"tags": "dog"},
    }
    (tmp_path / "meta_cap.json").write_text(json.dumps(content))
    opened = open_images(tmp_path)
    assert (opened.reader.layout, captions(opened)) == ("list", {"a.png": ("a cat,cat, blue",), "sub/b.jpg": ("dog",)})
    assert captions(open_images(tmp_path / "meta_cap.json")) == captions(opened)
    lines = [{"image_path": "a.png", "caption": "x"}, {"image_path": "sub/b.jpg", "caption": "", "more": 1}]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    opened = open_images(tmp_path / "set.jsonl")
    assert captions(opened) == {"a.png": ("x",), "sub/b.jpg": ("",)}
    assert "'more'" in told(opened)
    with pytest.raises(ValueError, match="2 lists of images"):
        open_images(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "link", "a\0b", "nothing", ""])
def test_a_list_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    paint(tmp_path / "secret.png")
    paint(folder / "a.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "l.json").write_text(json.dumps({name: {"caption": "x"}}))
    with pytest.raises(ValueError, match=r"leads out of|is not there|of another form"):
        open_images(folder / "l.json")


def test_images_alone_need_one_caption(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png", 1)
    with pytest.raises(ValueError, match=r"holds 2 images and no captions.*option 'one_caption'"):
        open_images(tmp_path)
    for caption in ("", "a drawing"):
        opened = open_images(tmp_path, ReadingOptions(one_caption=caption))
        assert captions(opened) == {"a.png": (caption,), "b.png": (caption,)}


def test_metadata_and_text_files_that_differ(tmp_path: Path) -> None:
    beside(tmp_path / "a.png", "one")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "one"}))
    assert captions(open_images(tmp_path)) == {"a.png": ("one",)}
    (tmp_path / "a.txt").write_text("other")
    with pytest.raises(ValueError, match=r"as imagefolder and as sidecar .* differ for 1 of 1 images"):
        open_images(tmp_path)
    for name, caption in (("imagefolder", "one"), ("sidecar", "other")):
        opened = open_images(tmp_path, ReadingOptions(layout=name))
        assert captions(opened) == {"a.png": (caption,)}


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"\xff\xfea\0", "is not UTF-8"), (b"a\0b", "NUL"), (b"x" * (2**20 + 1), "which is no caption")],
)
def test_caption_files_that_are_none(tmp_path: Path, text: bytes, message: str) -> None:
    beside(tmp_path / "a.png", text)
    with pytest.raises(ValueError, match=rf"a\.txt .*{message}"):
        open_images(tmp_path)


@pytest.mark.parametrize("what", ["a.png", "a.txt"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "folder"
    beside(folder / "a.png", "a")
    (folder / what).rename(tmp_path / what)
    (folder / what).symlink_to(tmp_path / what)
    with pytest.raises(ValueError, match="is a link that leads out of"):
        open_images(folder)


def test_places_of_no_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder or file"):
        open_images(tmp_path / "nothing")
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(ValueError, match="of no layout that can be read") as error:
        open_images(tmp_path)
    assert all(f"\n  {layout.name}: " in str(error.value) for layout in LAYOUTS)
    with pytest.raises(ValueError, match="did you mean 'sidecar'"):
        open_images(tmp_path, ReadingOptions(layout="sidecars"))
    for layout in LAYOUTS:
        with pytest.raises(ValueError):  # noqa: PT011  each says what it needs
            open_images(tmp_path, ReadingOptions(layout=layout.name))


def test_the_identity_sees_captions_repeats_and_images(tmp_path: Path) -> None:
    beside(tmp_path / "f/10_x/a.png", "a")
    paint(tmp_path / "f/2_y/b.png", 1)
    store = Store(tmp_path / "store")

    def built(**options: Any) -> Path:
        build_image_folder(store, tmp_path / "f", ImageFolderOptions(8, **options))
        return max((tmp_path / "store" / "image_folder").iterdir(), key=lambda path: path.stat().st_mtime_ns)

    seen = [built()]
    assert built() == seen[0]
    (tmp_path / "f/10_x/a.txt").write_text("b")
    seen.append(built())
    (tmp_path / "f/2_y").rename(tmp_path / "f/3_y")
    seen.append(built())
    paint(tmp_path / "f/3_y/b.png", 9)
    seen.append(built())
    seen.append(built(layout="sidecar"))
    assert len(set(seen)) == 5
