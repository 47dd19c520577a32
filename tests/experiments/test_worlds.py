"""What `experiments.worlds` and `experiments.customized` write is read back as the formats that it claims to be."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import LAION, MSCOCO
from experiments.customized import plan, rasterise, read_style, write_exemplars
from experiments.worlds import CAPTIONS, pairs, write_coco, write_shards
from wherefrom.data.image_folder import build_image_folder
from wherefrom.data.image_set import ImageSet
from wherefrom.runtime.artifacts import Store

SQUARE = '<path fill="#ff0000" d="M0 0h16v16H0z"/>'


def drawings(count: int) -> ImageSet:
    """Images as the emoji world has them."""
    random = np.random.default_rng(0)
    styles = tuple(("twemoji", "openmoji")[index % 2] for index in range(count))
    names = tuple(f"thing {index // 2}" for index in range(count))
    return ImageSet(
        tuple(f"e/{index}" for index in range(count)),
        tuple((f"{name}, {style} style",) for name, style in zip(names, styles, strict=True)),
        random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        {"style": styles, "name": names},
        "drawings",
    )


def test_scenes_are_coco(tmp_path: Path) -> None:
    images = drawings(40)
    write_coco(tmp_path / "coco", images, 10)
    module = MSCOCO(str(tmp_path / "coco"), store=str(tmp_path / "store"))
    train, held_out = module.load()
    assert (len(train), len(held_out)) == (10, 2)
    (first, second), *_ = pairs(images, 12)
    names = images.columns["name"][first], images.columns["name"][second]
    assert all(name in train.captions[0][place] for name in names for place in range(5))
    assert len(set(train.captions[0])) == len(CAPTIONS)
    assert images.columns["style"][first] == images.columns["style"][second]


def test_shards_lose_only_what_lies_behind_the_cut(tmp_path: Path) -> None:
    images = drawings(12)
    write_shards(tmp_path / "laion", images, shards=2, members=8)
    module = LAION(str(tmp_path / "laion"), validation_share=0.3, store=str(tmp_path / "store"))
    train, held_out = module.load()
    keys = sorted((*train.ids, *held_out.ids))
    assert keys[:8] == [f"00000{index:04d}" for index in range(8)], "the whole shard"
    rest = keys[8:]
    assert rest == [f"00001{index:04d}" for index in range(len(rest))]
    assert 2 <= len(rest) <= 5, "about half of the shard that was cut"
    (manifest,) = (tmp_path / "store" / "laion").glob("*/manifest.json")
    problems = json.dumps(json.loads(manifest.read_text())["problems"])
    assert all(f"00001{index:04d}" in problems for index in range(len(rest), 8)), "it says which"


def package(folder: Path, prefix: str, names: list[str], info: bool = True) -> Path:
    """An archive as `npm pack` leaves Iconify's."""
    icons = {"prefix": prefix, "width": 16, "icons": {name: {"body": SQUARE} for name in names}}
    info_file = {"name": prefix, "author": {"name": "A. Drawer"}, "license": {"spdx": "CC-BY-4.0"}}
    path = folder / f"{prefix}.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (("icons.json", icons), *((("info.json", info_file),) if info else ())):
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_a_style_is_read_from_its_package(tmp_path: Path) -> None:
    style = read_style(package(tmp_path, "round", ["red-apple", "dog"]))
    assert (style.name, style.license, style.author) == ("round", "CC-BY-4.0", "A. Drawer")
    assert set(style.drawings) == {"red apple", "dog"}
    pixels = rasterise(style.drawings["dog"])
    assert pixels.shape == (32, 32, 3)
    np.testing.assert_array_equal(pixels[16, 16], [255, 0, 0])
    with pytest.raises(ValueError, match=r"has no info\.json"):
        read_style(package(tmp_path, "bare", ["dog"], info=False))


def test_models_share_no_exemplar_and_ask_for_other_things(tmp_path: Path) -> None:
    names = [f"thing-{index}" for index in range(60)]
    styles = {name: read_style(package(tmp_path, name, names)) for name in ("one", "two", "three")}
    known = [name.replace("-", " ") for name in names]
    plans = plan(styles, known, 3)
    assert len(plans) == 6
    drawn = [each for each in plans if each.case == "emoji_styles"]
    exemplars = [name for each in drawn for _, name in each.exemplars]
    assert len(exemplars) == len(set(exemplars)) == 30
    for each in drawn:
        assert len({style for style, _ in each.exemplars}) == 1
        asked = {prompt.partition(",")[0] for prompt in each.prompts}
        assert not asked & {name for _, name in each.exemplars}
    for each in plans[3:]:
        assert {style for style, _ in each.exemplars} == set(styles)
        assert len({name for _, name in each.exemplars}) == 1
    files = write_exemplars(plans[0], styles, tmp_path / "exemplars")
    images = build_image_folder(Store(tmp_path / "store"), tmp_path / "exemplars")
    assert len(files) == len(images) == 10
    assert images.columns["license"][0] == "CC-BY-4.0"
    assert set(images.captions) == {("<new1> style",)}
    with Image.open(files[0]) as opened:
        assert opened.size == (32, 32)
    with pytest.raises(ValueError, match="things left for model"):
        plan(styles, known[:20], 3)
