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
    assert captions(open_images(tmp_path, ReadingOptions(caption_lines="whole")))["b.png"] == ("one\n\ntwo",)


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
    beside(tmp_path / "b.png", "a hill, [name]")
    beside(tmp_path / "c.png", "a hill")
    paint(tmp_path / "_controls/a.png")
    assert captions(open_images(tmp_path, ReadingOptions(trigger="sks"))) == {
        "a.png": ("sks on a hill",),
        "b.png": ("a hill, sks",),
        "c.png": ("sks a hill",),
    }
    none = captions(open_images(tmp_path, ReadingOptions(trigger="")))
    assert none == {"a.png": (" on a hill",), "b.png": ("a hill, ",), "c.png": ("a hill",)}


def test_a_configuration_beside_the_images_is_not_passed_over(tmp_path: Path) -> None:
    beside(tmp_path / "a.png", "a")
    (tmp_path / "pyproject.toml").write_text("[project]")
    assert "toml" not in told(open_images(tmp_path))
    (tmp_path / "set.toml").write_text(CONFIG)
    assert "does not read 'set.toml', which sets captions and repeats" in told(open_images(tmp_path))


def test_options_that_change_nothing_are_said(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "one"}))
    asked = ReadingOptions(trigger="sks", one_caption="x")
    assert "the option 'one_caption' and the option 'trigger' change nothing" in told(open_images(tmp_path, asked))


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


def test_one_of_kohyas_folders_given_itself(tmp_path: Path) -> None:
    folder = tmp_path / "10_blue cat"
    beside(folder / "a.png", "a cat\nanother line")
    paint(folder / "b.png", 1)
    paint(folder / "c.gif", 2)
    opened = open_images(folder)
    assert (opened.reader.layout, captions(opened)) == ("kohya", {"a.png": ("a cat",), "b.png": ("blue cat",)})
    assert {row.repeats for row in opened.reader.rows} == {10}
    assert "of which the first is the caption" in told(opened)
    assert "does not read: 'c.gif'" in told(opened)
    every = open_images(folder, ReadingOptions(caption_lines="each"))
    assert captions(every)["a.png"] == ("a cat", "another line")


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
    # The first data set alone has regularization images, and six others with their repeats; the second has two more.
    assert rows == {
        "cats/a.png": (("photo of a cat",), 4, "false"),
        "cats/b.png": (("photo of b cat",), 4, "false"),
        "reg/0.png": (("thing",), 2, "true"),
        "reg/1.png": (("thing",), 2, "true"),
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
        folder = "" if line.startswith("image_dir") else 'image_dir = "cats"\n'
        head = '[general]\ncaption_extension = ".txt"\n[[datasets]]\n[[datasets.subsets]]\n'
        (tmp_path / "bad.toml").write_text(f"{head}{folder}{line}\n")
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / "bad.toml")


def config(folder: Path, text: str) -> OpenedImages:
    (folder / "set.toml").write_text(text)
    return open_images(folder / "set.toml")


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        # By hand from `process_caption` of sd-scripts, whose own draws these are.
        ("", "one\ntwo", ("one",)),
        ("", "\none", ("",)),
        ('caption_prefix = "P"\ncaption_suffix = "S"', "one, two", ("P one, two S",)),
        ("enable_wildcard = true", "one\n\ntwo", ("one", "two")),
        ('enable_wildcard = true\ncaption_prefix = "P"\ncaption_suffix = "S"', "one\ntwo", ("P one", "two S")),
        ("enable_wildcard = true", "a {red|blue} {{cat}}", ("a red {cat}", "a blue {cat}")),
        ("enable_wildcard = true", "{a|b|c}\nd", ("a", "b", "c", "d", "d", "d")),
        ("", "a {red|blue} cat", ("a {red|blue} cat",)),
        ("shuffle_caption = true", "a,b ,  c", ("a, b, c",)),
        ('shuffle_caption = true\nkeep_tokens_separator = "|||"', "a ||| b, c", ("a, b, c",)),
        ('secondary_separator = ";;;"', "a;;;b, c", ("a,b, c",)),
    ],
)
def test_captions_are_what_kohyas_trainer_makes_of_a_text(
    tmp_path: Path, settings: str, text: str, expected: tuple[str, ...]
) -> None:
    beside(tmp_path / "cats/a.png", text, ".caption")
    opened = config(tmp_path, f'[general]\n{settings}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\n')
    assert captions(opened) == {"cats/a.png": expected}


def test_too_many_wildcards_are_refused(tmp_path: Path) -> None:
    beside(tmp_path / "cats/a.png", "{a|b}" * 40, ".caption")
    with pytest.raises(ValueError, match=r"a\.png: .*make 1,099,511,627,776 captions, and 60 is the limit"):
        config(tmp_path, '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\nenable_wildcard = true\n')


def test_the_suffix_that_the_trainer_was_given_elsewhere(tmp_path: Path) -> None:
    beside(tmp_path / "cats/a.png", "a cat")
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\nclass_tokens = "thing"\n'
    with pytest.raises(ValueError, match=r"has no caption_extension \(without it the trainer reads \.caption"):
        config(tmp_path, text)
    asked = open_images(tmp_path / "set.toml", ReadingOptions(caption=".txt"))
    assert captions(asked) == {"cats/a.png": ("a cat",)}
    (tmp_path / "cats/a.txt").unlink()
    assert captions(open_images(tmp_path / "set.toml")) == {"cats/a.png": ("thing",)}


def test_each_data_set_has_its_own_regularization(tmp_path: Path) -> None:
    for index, name in enumerate(("cats/a.png", "dogs/b.png", "reg/c.png", "reg/d.png", "reg/e.png")):
        paint(tmp_path / name, index)
    sets = "".join(
        f"[[datasets]]\nresolution = {size}\n[[datasets.subsets]]\nimage_dir = {folder!r}\nnum_repeats = {repeats}\n"
        '[[datasets.subsets]]\nimage_dir = "reg"\nis_reg = true\n'
        for size, folder, repeats in ((512, "cats", 5), (768, "dogs", 2))
    )
    rows = config(tmp_path, sets).reader.rows
    # Five over three images are 2, 2, 1; two are 1, 1, 0.
    assert {row.id: row.repeats for row in rows} == {
        "cats/a.png": 5,
        "dogs/b.png": 2,
        "reg/c.png": 3,
        "reg/d.png": 3,
        "reg/e.png": 1,
    }


def test_a_configuration_of_musubi(tmp_path: Path) -> None:
    beside(tmp_path / "cats/a.png", "a cat\non two lines\n")
    paint(tmp_path / "cats/b.png", 1)
    paint(tmp_path / "cats/deep/c.png", 1)
    paint(tmp_path / "dogs/d.png", 2)
    (tmp_path / "dogs.jsonl").write_text(json.dumps({"image_path": "dogs/d.png", "caption": "d\ne"}))
    opened = config(
        tmp_path,
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nimage_directory = "cats"\nnum_repeats = 2\n'
        '[[datasets]]\nimage_jsonl_file = "dogs.jsonl"\n',
    )
    assert {row.id: (row.captions, row.repeats) for row in opened.reader.rows} == {
        "cats/a.png": (("a cat\non two lines",), 2),
        "dogs/d.png": (("d\ne",), 1),
    }
    assert "so not trained on: 'b.png'" in told(opened)
    assert "where the trainer does not look: 'deep/c.png'" in told(opened)
    with pytest.raises(ValueError, match="control_directory is not supported"):
        config(tmp_path, '[[datasets]]\nimage_directory = "cats"\ncontrol_directory = "dogs"\n')


@pytest.mark.parametrize(
    ("lines", "expected"), [(None, "one"), ("first", "one"), ("whole", "one\ntwo,t"), ("each", ("one", "two,t"))]
)
def test_lines_of_a_list(tmp_path: Path, lines: Any, expected: str | tuple[str, ...]) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / "l.json").write_text(json.dumps({"a.png": {"caption": "one\ntwo", "tags": "t"}}))
    opened = open_images(tmp_path / "l.json", ReadingOptions(caption_lines=lines))
    assert captions(opened) == {"a.png": (expected,) if isinstance(expected, str) else expected}
    assert ("the first is the caption" in told(opened)) is (lines is None)


def test_tags_stand_after_each_line_of_a_list_with_wildcards(tmp_path: Path) -> None:
    paint(tmp_path / "cats/a.png")
    (tmp_path / "l.json").write_text(json.dumps({"a": {"caption": "one\ntwo", "tags": "t"}}))
    opened = config(
        tmp_path,
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\nmetadata_file = "l.json"\nenable_wildcard = true\n',
    )
    assert captions(opened) == {"cats/a.png": ("one,t", "two,t")}


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
