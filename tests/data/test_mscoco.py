"""COCO 2017: captions, licences, images, bad files, resume, and the same pipeline as the emoji world."""

from __future__ import annotations

import copy
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import evaluate
from datamodules import MSCOCO
from tests.support.processes import exit_status_of
from tests.support.tiny import attribution_config
from tests.support.worlds import LICENSES, make_coco, write_captions
from wherefrom.data import mscoco
from wherefrom.data.aspect_buckets import Buckets
from wherefrom.data.framing import Framing
from wherefrom.data.image_files import load_image
from wherefrom.data.image_set import ImageSet
from wherefrom.data.mscoco import CocoOptions, build_mscoco, read_captions
from wherefrom.runtime.artifacts import Store, read_manifest

ROOT = Path(__file__).parents[2]
CaptionsFile = dict[str, Any]


@pytest.fixture
def captions_file(folder: Path) -> CaptionsFile:
    return make_coco(folder)["train2017"]


@pytest.fixture
def coco(
    tmp_path: Path, folder: Path, captions_file: CaptionsFile, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ImageSet]:
    monkeypatch.setattr(mscoco, "_PART", 5)

    def build(store: str = "store", subset: Any = None, progress: Any = None, **options: Any) -> ImageSet:
        captions = folder / "annotations" / "captions_train2017.json"
        given = CocoOptions(**{"size": 8, **options})
        return build_mscoco(
            Store(tmp_path / store),
            folder=folder / "train2017",
            captions=captions,
            options=given,
            subset=subset,
            progress=progress,
        )

    return build


def test_ids_captions_licences_and_pixels(
    folder: Path, captions_file: CaptionsFile, coco: Callable[..., ImageSet]
) -> None:
    image_set = coco()
    ids = sorted(image["id"] for image in captions_file["images"])
    assert image_set.ids == tuple(map(str, ids))
    assert sorted(image_set.ids) != list(image_set.ids), "numbers are not sorted as text"
    assert ids != [image["id"] for image in captions_file["images"]], "nor is the file in their order"
    names = {entry["id"]: entry["name"] for entry in LICENSES}
    images = {image["id"]: image for image in captions_file["images"]}
    for row, image in enumerate(ids):
        written = [each["caption"] for each in captions_file["annotations"] if each["image_id"] == image]
        assert image_set.captions[row] == tuple(written[:5])
        assert image_set.columns["license"][row] == names[images[image]["license"]]
        assert image_set.columns["url"][row] == images[image]["flickr_url"]
        with Image.open(folder / "train2017" / images[image]["file_name"]) as opened:
            side = min(opened.size)
            left, top = (opened.width - side) // 2, (opened.height - side) // 2
            square = opened.crop((left, top, left + side, top + side)).resize((8, 8), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(image_set.pixels[row], np.asarray(square))
    assert isinstance(image_set.pixels, np.memmap)


def test_the_first_captions_of_each_image(
    folder: Path, captions_file: CaptionsFile, coco: Callable[..., ImageSet]
) -> None:
    five, two = coco(), coco(captions=2)
    assert two.captions == tuple(several[:2] for several in five.captions)
    with pytest.raises(ValueError, match=r"12 images have fewer than 6 captions"):
        coco(captions=6)


def without(captions_file: CaptionsFile, name: str) -> CaptionsFile:
    return {key: value for key, value in captions_file.items() if key != name}


def changed(captions_file: CaptionsFile, path: tuple[Any, ...], value: Any) -> CaptionsFile:
    made: Any = copy.deepcopy(captions_file)
    place = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return made


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda captions_file: "{", r"captions_train2017\.json is not valid JSON"),
        (lambda captions_file: "[]", r"holds no JSON object"),
        (lambda captions_file: without(captions_file, "images"), r"has no list 'images'.*captions_train2017"),
        (lambda captions_file: without(captions_file, "annotations"), r"has no list 'annotations'"),
        (lambda captions_file: changed(captions_file, ("images", 3), 5), r"images\[3\] has no 'id' of type int or str"),
        (
            lambda captions_file: changed(captions_file, ("images", 3, "id"), 7.5),
            r"images\[3\] has no 'id' of type int or str \(7\.5\)",
        ),
        (
            lambda captions_file: changed(captions_file, ("annotations", 2), {"image_id": 9, "bbox": []}),
            r"instances_… .*hold no captions",
        ),
        (
            lambda captions_file: changed(captions_file, ("annotations", 0, "image_id"), 5),
            r"a caption is of image 5, which 'images'",
        ),
        (
            lambda captions_file: changed(captions_file, ("images", 1, "id"), captions_file["images"][0]["id"]),
            r"1 image ids occur more than once",
        ),
        (
            lambda captions_file: changed(
                captions_file, ("images", 1, "file_name"), captions_file["images"][0]["file_name"]
            ),
            r"occur more than once: '0000000000",
        ),
        (
            lambda captions_file: changed(captions_file, ("images", 1, "file_name"), "../x.jpg"),
            r"'\.\./x\.jpg', which leads elsewhere",
        ),
        (
            lambda captions_file: changed(captions_file, ("images", 1, "file_name"), "/etc/passwd"),
            r"which leads elsewhere",
        ),
        (
            lambda captions_file: changed(
                captions_file,
                ("annotations",),
                [each for each in captions_file["annotations"] if each["image_id"] != 9],
            ),
            r"1 images have no caption: '9'",
        ),
        (
            lambda captions_file: changed(captions_file, ("images", 1, "file_name"), "no.jpg"),
            r"train2017 lacks 1 of 12 images: 'no\.jpg'",
        ),
    ],
)
def test_bad_files_are_refused_before_anything_is_decoded(
    tmp_path: Path,
    folder: Path,
    captions_file: CaptionsFile,
    coco: Callable[..., ImageSet],
    spoil: Callable[[CaptionsFile], Any],
    message: str,
) -> None:
    write_captions(folder, "train2017", spoil(captions_file))
    with pytest.raises(ValueError, match=message):
        coco()
    assert not (tmp_path / "store").exists()


def test_missing_files_and_folders(folder: Path, captions_file: CaptionsFile, coco: Callable[..., ImageSet]) -> None:
    (folder / "annotations" / "captions_train2017.json").rename(folder / "x.json")
    with pytest.raises(ValueError, match=r"captions_train2017\.json is not a file\. Unpack"):
        coco()
    (folder / "x.json").rename(folder / "annotations" / "captions_train2017.json")
    (folder / "train2017").rename(folder / "x")
    with pytest.raises(ValueError, match=r"train2017 is not a folder"):
        coco()


def test_unreadable_images_are_named_or_skipped_and_counted(
    tmp_path: Path,
    folder: Path,
    captions_file: CaptionsFile,
    coco: Callable[..., ImageSet],
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = folder / "train2017" / captions_file["images"][2]["file_name"]
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"{broken.name} cannot be read: .*on_error: skip"):
        coco()
    for _ in range(2):  # decoded, then found
        with caplog.at_level(logging.WARNING):
            images = coco(on_error="skip")
        assert f"11 images are used; skipped were 1 cannot be read: '{broken.name}'" in caplog.text
        caplog.clear()
    assert len(images) == len(images.pixels) == 11
    assert str(captions_file["images"][2]["id"]) not in images.ids
    (made,) = (path for path in (tmp_path / "store" / "mscoco").iterdir() if path.suffix != ".partial")
    assert [name for name, _, _ in read_manifest(made)["problems"]] == [broken.name]


def test_bad_headers_are_all_named_before_anything_is_decoded(
    tmp_path: Path, folder: Path, captions_file: CaptionsFile, coco: Callable[..., ImageSet]
) -> None:
    names = sorted(image["file_name"] for image in captions_file["images"][3:5])
    for name in names:
        (folder / "train2017" / name).write_bytes(b"not an image")
    for workers in (1, 3):
        with pytest.raises(ValueError, match=r"^2 of 12 images .*headers.*on_error: skip") as error:
            coco(workers=workers)
        assert all(f"{name} cannot be read" in str(error.value) for name in names)
    assert not list((tmp_path / "store").rglob("part-*")), "nothing was decoded"
    assert sorted(coco(on_error="skip").skipped) == names


def test_another_frame_and_shape(folder: Path, captions_file: CaptionsFile, coco: Callable[..., ImageSet]) -> None:
    file = {str(image["id"]): image["file_name"] for image in captions_file["images"]}
    framing = Framing(fit="pad", pad_color="black")
    images = coco(size=(6, 10), framing=framing)
    assert images.pixels.shape == (12, 6, 10, 3)
    for name, pixels in zip(images.ids, images.pixels, strict=True):
        np.testing.assert_array_equal(pixels, load_image(folder / "train2017" / file[name], (6, 10), framing))
    assert coco().fingerprint == coco(size=(8, 8)).fingerprint != images.fingerprint
    with pytest.raises(ValueError, match="buckets: these images are brought to one size"):
        coco(framing=Framing(buckets=Buckets()))


def test_ids_may_be_text_and_files_in_subfolders(
    folder: Path, captions_file: CaptionsFile, coco: Callable[..., ImageSet]
) -> None:
    numbered = coco()
    for name in ("images", "annotations"):
        for entry in captions_file[name]:
            key = "id" if name == "images" else "image_id"
            entry[key] = f"img-{entry[key]:05d}"
    (folder / "train2017" / "a" / "b").mkdir(parents=True)
    for image in captions_file["images"][:3]:
        (folder / "train2017" / image["file_name"]).rename(folder / "train2017" / "a" / "b" / image["file_name"])
        image["file_name"] = f"a/b/{image['file_name']}"
    write_captions(folder, "train2017", captions_file)
    named = coco()
    assert named.ids == tuple(f"img-{int(name):05d}" for name in numbered.ids), "as text, in the order of text"
    assert named.captions == numbered.captions
    np.testing.assert_array_equal(named.pixels, numbered.pixels)
    assert sum(name.startswith("a/b/") for name in named.columns["file_name"]) == 3
    (folder / "elsewhere").mkdir()
    (folder / "train2017" / "link").symlink_to(folder / "elsewhere")
    image = captions_file["images"][5]
    (folder / "train2017" / image["file_name"]).rename(folder / "elsewhere" / image["file_name"])
    write_captions(
        folder, "train2017", changed(captions_file, ("images", 5, "file_name"), f"link/{image['file_name']}")
    )
    with pytest.raises(ValueError, match=r"train2017/link leads out of "):
        coco()


def test_only_images_that_are_asked_for_need_captions(
    folder: Path, captions_file: CaptionsFile, coco: Callable[..., ImageSet]
) -> None:
    first, second, third = (image["id"] for image in captions_file["images"][:3])
    kept = [each for each in captions_file["annotations"] if each["image_id"] != first]
    for each in [each for each in kept if each["image_id"] == second]:
        each["caption"] = " "
    of_third = [each for each in kept if each["image_id"] == third]
    of_third[0]["caption"] = ""
    write_captions(folder, "train2017", {**captions_file, "annotations": kept})
    with pytest.raises(ValueError, match=rf"1 images have no caption: '{first}'.*option 'subset'"):
        coco()
    images = coco(subset=[str(image["id"]) for image in captions_file["images"][1:]])
    assert len(images) == 11
    captions = dict(zip(images.ids, images.captions, strict=True))
    assert captions[str(second)] == ("",) * 5, "an empty caption is one"
    assert captions[str(third)] == (*(each["caption"] for each in of_third[1:]), ""), "what says something comes first"


def karpathy(folder: Path, captions_file: CaptionsFile) -> CaptionsFile:
    """Karpathy's file of the same images: the first six for training, four more, one each for val and test."""
    splits = ["train"] * 6 + ["restval"] * 4 + ["val", "test"]
    said = [
        [a["caption"] for a in captions_file["annotations"] if a["image_id"] == image["id"]]
        for image in captions_file["images"]
    ]
    content = {
        "dataset": "coco",
        "images": [
            {
                "filepath": "train2017",
                "filename": image["file_name"],
                "cocoid": image["id"],
                "imgid": number,
                "sentids": [],
                "split": split,
                "sentences": [{"raw": text, "tokens": text.split(), "imgid": number} for text in texts],
            }
            for number, (image, split, texts) in enumerate(zip(captions_file["images"], splits, said, strict=True))
        ],
    }
    (folder / "dataset_coco.json").write_text(json.dumps(content))
    return content


def test_karpathys_splits(
    tmp_path: Path,
    folder: Path,
    captions_file: CaptionsFile,
    coco: Callable[..., ImageSet],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = coco()
    content = karpathy(folder, captions_file)
    ids = {
        split: {str(each["cocoid"]) for each in content["images"] if each["split"] == split}
        for split in ("train", "restval", "val", "test")
    }
    common: dict[str, Any] = {"options": CocoOptions(size=8), "store": str(tmp_path / "store")}
    caplog.set_level(logging.INFO, "lightning.pytorch")
    data = MSCOCO(str(folder), **common)
    train, held_out = data.load()
    assert set(train.ids) == ids["train"] | ids["restval"]
    assert set(held_out.ids) == ids["val"]
    assert "dataset_coco.json: 10 training images of the splits 'train', 'restval'; held out: 'val'" in caplog.text
    where = [plain.ids.index(name) for name in train.ids]
    assert where == sorted(where), "in the numerical order of the ids"
    assert train.captions == tuple(plain.captions[place] for place in where)
    np.testing.assert_array_equal(train.pixels, np.asarray(plain.pixels)[where])
    census = data.census()
    assert (census.training, census.held_out) == (10, 1)
    assert census.decode is not None
    assert census.decode() == 10
    several = MSCOCO(str(folder), split=["train", "test"], held_out="none", **common).load()
    assert (set(several[0].ids), len(several[1])) == (ids["train"] | ids["test"], 0)
    with pytest.raises(ValueError, match=r"no image has the split 'dev'; its splits are 'restval' \(4\), 'test' \(1\)"):
        MSCOCO(str(folder), split="dev", **common).load()
    with pytest.raises(ValueError, match="held_out: 'val' cannot be trained on"):
        MSCOCO(str(folder), split="val", **common)
    # COCO's own files are still there, and are read where they are named.
    own = MSCOCO(str(folder), captions_file="annotations/captions_{split}.json", held_out="none", **common)
    assert own.load()[0].ids == plain.ids


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("images", 2, "cocoid"), 1.5, r"images\[2\] has no 'cocoid'"),
        (("images", 2, "sentences"), [{"tokens": []}], r"images\[2\] has a sentence without 'raw'"),
        (("images", 2, "filepath"), "../train2017", r"which leads elsewhere"),
        (("images", 2, "filepath"), "/etc", r"which leads elsewhere"),
        (("images", 2, "sentences"), [], r"1 images have no caption"),
    ],
)
def test_bad_files_of_karpathys_are_refused(
    tmp_path: Path, folder: Path, captions_file: CaptionsFile, path: tuple[Any, ...], value: Any, message: str
) -> None:
    content = changed(karpathy(folder, captions_file), path, value)
    (folder / "dataset_coco.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        MSCOCO(str(folder), options=CocoOptions(size=8), store=str(tmp_path / "store")).load()


def test_a_subset_by_ids(coco: Callable[..., ImageSet]) -> None:
    whole = coco()
    part = coco(subset=[whole.ids[7], whole.ids[0]])
    assert part.ids == (whole.ids[0], whole.ids[7])
    np.testing.assert_array_equal(part.pixels, np.asarray(whole.pixels)[[0, 7]])
    with pytest.raises(ValueError, match=r"subset names 1 ids that the captions file does not have: 'no'"):
        coco(subset=["no", whole.ids[0]])
    with pytest.raises(ValueError, match=r"1 image ids occur more than once"):
        coco(subset=[whole.ids[0]] * 2)


def test_workers_and_places_change_nothing(coco: Callable[..., ImageSet]) -> None:
    one, three = coco(), coco("other", workers=3)
    assert one.fingerprint == three.fingerprint
    assert one.ids == three.ids
    np.testing.assert_array_equal(one.pixels, three.pixels)


def test_the_store_is_used_until_a_file_changes(
    folder: Path, captions_file: CaptionsFile, coco: Callable[..., ImageSet]
) -> None:
    seen: list[int] = []
    first = coco(progress=lambda done, total: seen.append(done))
    assert seen == [*range(1, 13)]
    coco(progress=lambda done, total: seen.append(done))
    assert len(seen) == 12
    (folder / "train2017" / captions_file["images"][0]["file_name"]).write_bytes(
        (folder / "train2017" / captions_file["images"][1]["file_name"]).read_bytes() + b" "
    )
    assert coco().fingerprint != first.fingerprint


def build_until_killed(store: Path, folder: Path) -> None:
    """Decodes eight images in parts of five, and is killed."""
    mscoco._PART = 5

    def progress(done: int, total: int) -> None:
        if done == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    captions = folder / "annotations" / "captions_train2017.json"
    build_mscoco(
        Store(store), folder=folder / "train2017", captions=captions, options=CocoOptions(size=8), progress=progress
    )


def test_a_killed_run_decodes_only_what_is_missing(tmp_path: Path, folder: Path, coco: Callable[..., ImageSet]) -> None:
    assert exit_status_of(build_until_killed, tmp_path / "store", folder) == -signal.SIGKILL
    seen: list[int] = []
    resumed = coco(progress=lambda done, total: seen.append(done))
    assert seen == [6, 7, 8, 9, 10, 11, 12], "the first part of five was finished"
    whole = coco("other")
    assert resumed.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(resumed.pixels, whole.pixels)
    (made,) = (tmp_path / "store" / "mscoco").iterdir()
    assert not list(made.glob("part-*"))


def test_order_and_captions_can_be_read_alone(folder: Path, captions_file: CaptionsFile) -> None:
    images = read_captions(folder / "annotations" / "captions_train2017.json", 2)
    assert [int(image.id) for image in images] == sorted(image["id"] for image in captions_file["images"])
    assert {len(image.captions) for image in images} == {2}


def test_data_module(tmp_path: Path, folder: Path, captions_file: CaptionsFile) -> None:
    ids = [str(image["id"]) for image in captions_file["images"]]
    (tmp_path / "subset.txt").write_text("\n".join(ids[:6]))
    data = MSCOCO(
        str(folder),
        options=CocoOptions(size=8),
        subset=str(tmp_path / "subset.txt"),
        exclude=ids[:1],
        store=str(tmp_path / "store"),
        batch_size=2,
    )
    data.prepare_data()
    data.setup()
    assert set(data.train_images.ids) == set(ids[1:6])
    assert len(data.validation_images) == 4
    assert not set(data.validation_images.ids) & set(ids)
    assert sum(len(batch.pixels) for batch in data.val_dataloader()) == 4


def coco_run(folder: Path, name: str, **init_args: Any) -> Path:
    data = {"class_path": "MSCOCO", "init_args": {"folder": str(folder / "coco"), "options": {"size": 8}, **init_args}}
    config = attribution_config(folder, name, data=data)
    evaluate.main(["attribute", "-c", str(config)])
    return folder / name


def test_the_pipeline_attributes_to_coco(tmp_path: Path) -> None:
    captions_file = make_coco(tmp_path / "coco")["train2017"]
    run = coco_run(tmp_path, "run")
    rows = pq.read_table(run / "ranking.parquet").to_pylist()
    assert {row["image"] for row in rows} == {str(image["id"]) for image in captions_file["images"]}
    assert [row["rank"] for row in rows] == list(range(1, 13))
    assert all(0 < row["p_value"] <= 1 for row in rows), "val2017 is the null"
    page = (run / "report.html").read_text()
    assert "United States Government Work" in page
    scores = {row["image"]: row["score"] for row in rows}
    # In float32 the same scores come out, up to the rounding of latents and states to float16.
    whole = pq.read_table(coco_run(tmp_path, "whole", half=False) / "ranking.parquet").to_pylist()
    correlation = np.corrcoef([row["score"] for row in whole], [scores[row["image"]] for row in whole])[0, 1]
    assert correlation > 0.99
