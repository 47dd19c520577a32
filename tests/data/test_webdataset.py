"""LAION's shards: samples in any order, damage anywhere, tricks, sharing out, subsets."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import evaluate
from datamodules import LAION
from tests.support.tiny import attribution_config
from tests.support.worlds import add_member, jpeg_of, make_shards, plain, sample_of, write_shard, write_table
from wherefrom.data import webdataset
from wherefrom.data.decoding import Sample, SkippedItem, assign_parts
from wherefrom.data.image_folder import split_images
from wherefrom.data.image_set import ImageSet
from wherefrom.data.shards import DAMAGED, LARGE, REFUSED, ShardSample, read_shard
from wherefrom.data.webdataset import (
    LOST,
    NO_CAPTION,
    NO_IMAGE,
    SEVERAL_IMAGES,
    UNDECODABLE,
    ShardOptions,
    build_laion,
    decode_shard,
    decode_shards,
    plan_shards,
)
from wherefrom.runtime.artifacts import Store, read_manifest

SMALL = ShardOptions(size=8)


@pytest.fixture
def keys(folder: Path) -> list[list[str]]:
    return make_shards(folder)


def build(tmp_path: Path, folder: Path, store: str = "store", subset: Any = None, **options: Any) -> ImageSet:
    return build_laion(
        Store(tmp_path / store), folder=folder, options=ShardOptions(**{"size": 8, **options}), subset=subset
    )


def problems(tmp_path: Path, store: str = "store") -> list[SkippedItem]:
    (made,) = (path for path in (tmp_path / store / "laion").iterdir() if path.suffix != ".partial")
    return [SkippedItem(*each) for each in read_manifest(made)["problems"]]


def test_keys_captions_columns_and_pixels(tmp_path: Path, folder: Path, keys: list[list[str]]) -> None:
    images = build(tmp_path, folder, license="LICENSE", columns=("url", "caption"))
    every = [key for several in keys for key in several]
    assert images.ids == tuple(every)
    for index, key in enumerate(every):
        members = dict(sample_of(key, index))
        assert images.captions[index] == (members[f"{key}.txt"].decode(),)
        (name,) = (name for name in members if not name.endswith((".txt", ".json")))
        path = tmp_path / name
        path.write_bytes(members[name])
        with Image.open(path) as opened:
            square = opened.convert("RGB").crop((2, 0, 14, 12)).resize((8, 8), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(images.pixels[index], np.asarray(square))
    assert images.columns["url"] == tuple(f"http://x/{key}" for key in every)
    assert images.columns["shard"][10] == "00001.tar"
    assert images.columns["license"] == tuple("?" if index % 2 else "unknown" for _ in keys for index in range(10))
    assert not problems(tmp_path)
    assert isinstance(images.pixels, np.memmap)


def test_a_sample_that_is_skipped_can_stop_the_reading(tmp_path: Path, folder: Path, keys: list[list[str]]) -> None:
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"00001\.tar.*on_error: skip; finished parts are kept"):
        build(tmp_path, folder, on_error="stop")
    partial = next((tmp_path / "store" / "laion").iterdir())
    assert [file.name for file in partial.glob("part-*.json")] == ["part-000000.json"]
    images = build(tmp_path, folder)
    assert len(images) == sum(map(len, keys)) - 10
    assert "00001.tar" in images.skipped
    with pytest.raises(ValueError, match=r"damaged shards: '00001\.tar'.*on_error: skip, which leaves them out"):
        build(tmp_path, folder, on_error="stop")
    whole = build_laion(Store(tmp_path / "whole"), folder=make(tmp_path / "again"), options=SMALL)
    stopping = build_laion(
        Store(tmp_path / "stopping"), folder=tmp_path / "again", options=ShardOptions(size=8, on_error="stop")
    )
    assert stopping.fingerprint == whole.fingerprint


CUTS = ["in a header", "between header and data", "in data", "after a member", "before the end mark", "first block"]


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_shard_loses_only_what_is_behind_the_cut(
    tmp_path: Path, folder: Path, keys: list[list[str]], cut: str
) -> None:
    path = folder / "00002.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    fifth = [member for member in members if member.name.startswith("000020005")]
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    at, kept = {
        "in a header": (fifth[0].offset + 100, 5),
        "between header and data": (fifth[0].offset_data, 5),
        "in data": (fifth[1].offset_data + fifth[1].size // 2, 5),
        "after a member": (fifth[2].offset_data + -(-fifth[2].size // 512) * 512, 6),
        "before the end mark": (end, 10),
        "first block": (100, 0),
    }[cut]
    path.write_bytes(path.read_bytes()[:at])
    images = build(tmp_path, folder)
    lost = keys[2][kept:]
    assert images.ids == tuple(key for several in keys for key in several if key not in lost)
    whole = build_laion(Store(tmp_path / "whole"), folder=make(tmp_path / "again"), options=SMALL)
    where = [whole.ids.index(name) for name in images.ids]
    np.testing.assert_array_equal(images.pixels, np.asarray(whole.pixels)[where])
    result = problems(tmp_path)
    (damage,) = (problem for problem in result if problem.kind == DAMAGED)
    assert damage.name == "00002.tar"
    assert f"of {at:,}" in damage.detail
    named = {problem.name.partition(": ")[2] for problem in result if problem.kind in (LOST, NO_IMAGE, NO_CAPTION)}
    assert named == set(lost), "every lost sample is named"


def make(folder: Path) -> Path:
    make_shards(folder)
    return folder


def test_broken_members_are_counted_by_name(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, text = jpeg_of(0, (16, 12)), b"a caption"
    metadata = json.dumps({"caption": "from the json"}).encode()
    members = [
        *[("ok.jpg", good), ("ok.txt", text)],
        *[("json.jpg", good), ("json.json", metadata)],
        *[("cut.jpg", good[:150]), ("cut.txt", text)],
        *[("not.png", b"<script>"), ("not.txt", text)],
        *[("mute.jpg", good), ("mute.json", b'{"caption": null}')],
        *[("blank.jpg", good), ("blank.txt", b" \n")],
        *[("void.jpg", good), ("void.txt", b""), ("void.json", b'{"caption": null}')],
        *[("half.jpg", good), ("half.json", b'{"caption": "\\ud800"}')],
        *[("latin.jpg", good), ("latin.txt", b"caf\xe9")],
        *[("blind.txt", text), ("blind.json", metadata)],
        *[("bomb.png", jpeg_of(0, (30, 30), "PNG")), ("bomb.txt", text)],
        *[("warned.png", jpeg_of(0, (20, 15), "PNG")), ("warned.txt", text)],
        *[("big.jpg", good + bytes(5000)), ("big.txt", text)],
        *[("twice.jpg", good), ("twice.jpg", jpeg_of(1, (16, 12))), ("twice.txt", text)],
        *[("ok.png", jpeg_of(2, (16, 12), "PNG")), ("ok.txt", b"again")],
        *[("last.JPG", good), ("last.txt", text), ("last.npy", b"x")],
    ]
    names = dict.fromkeys(name.partition(".")[0] for name, _ in members)
    write_shard(folder, plain(members), [*names, "gone"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with caplog.at_level(logging.WARNING):
        images = build(tmp_path, folder, largest_member=5000)
    assert images.ids == ("ok", "json", "blank", "twice", "last")
    assert images.captions[1] == ("from the json",)
    assert images.captions[2] == ("",), "an empty caption is one, and none is not"
    np.testing.assert_array_equal(images.pixels[0], images.pixels[3])
    result: dict[str, list[str]] = {}
    for problem in problems(tmp_path):
        result.setdefault(problem.kind, []).append(problem.name.removeprefix("00000.tar: "))
    assert result == {
        UNDECODABLE: ["cut", "not", "bomb", "warned"],
        NO_CAPTION: ["mute", "void", "half", "latin"],
        NO_IMAGE: ["blind", "big"],
        LARGE: ["big.jpg"],
        REFUSED: ["twice.jpg", "ok.png", "ok.txt"],
        LOST: ["gone"],
    }
    assert "5 images are used; skipped were 4 images that cannot be decoded: '00000.tar: cut'" in caplog.text
    assert "decompression bomb" in next(each.detail for each in problems(tmp_path) if each.name.endswith("warned"))


def test_shards_without_tables_name_their_own_samples(tmp_path: Path, folder: Path, keys: list[list[str]]) -> None:
    whole = build(tmp_path, folder)
    for table in folder.glob("*.parquet"):
        table.unlink()
    alone = build(tmp_path, folder)
    assert (alone.ids, alone.captions) == (whole.ids, whole.captions)
    assert alone.columns == {**whole.columns, "license": ("unknown",) * len(whole)}
    np.testing.assert_array_equal(alone.pixels, whole.pixels)
    assert build(tmp_path, folder, subset=keys[2][3:5]).ids == tuple(keys[2][3:5])
    with pytest.raises(ValueError, match=r"subset names 1 keys .*'no'; keys look like '000000000'"):
        build(tmp_path, folder, subset=["no"])
    # A cut shard says what is behind the cut as far as anybody knows.
    path = folder / "00003.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    cut = build(tmp_path, folder, store="cut")
    assert cut.ids == whole.ids[: len(cut)]
    assert [problem.kind for problem in problems(tmp_path, "cut")][-1] == DAMAGED


def test_shards_in_subfolders_have_ids_of_their_own(tmp_path: Path, folder: Path) -> None:
    for place in ("a", "b/c"):
        make_shards(folder / place, shards=1, count=3)
    images = build(tmp_path, folder)
    names = [f"00000000{number}" for number in range(3)]
    assert images.ids == tuple(f"{place}/{name}" for place in ("a", "b/c") for name in names)
    assert images.columns["shard"] == ("a/00000.tar",) * 3 + ("b/c/00000.tar",) * 3
    assert images.columns["url"][:3] == tuple(f"http://x/{name}" for name in names)
    assert build(tmp_path, folder, subset=["b/c/000000001"]).ids == ("b/c/000000001",)
    assert not [each for each in problems_of_all(tmp_path) if each.kind != LOST]


def problems_of_all(tmp_path: Path) -> list[SkippedItem]:
    manifests = [read_manifest(path) for path in (tmp_path / "store" / "laion").iterdir() if path.suffix != ".partial"]
    return [SkippedItem(*each) for manifest in manifests for each in manifest["problems"]]


def shard_of(folder: Path, *samples: dict[str, bytes]) -> Path:
    """A shard of samples 0, 1, … without a table."""
    folder.mkdir(exist_ok=True)
    members = [(f"s/{number}.{kind}", content) for number, each in enumerate(samples) for kind, content in each.items()]
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, content in members:
            add_member(tar, name, content)
    return folder


def test_members_of_other_names(tmp_path: Path, folder: Path) -> None:
    one, other = jpeg_of(1, (8, 8), "PNG"), jpeg_of(2, (8, 8), "PNG")
    alone = shard_of(tmp_path / "alone", {"input.png": one, "caption": b"of a.b", "cls": b"7"})
    images = build(tmp_path, alone, columns=())
    assert (images.ids, images.captions) == (("s/0",), (("of a.b",),))
    np.testing.assert_array_equal(images.pixels[0], np.asarray(Image.open(io.BytesIO(one))))
    assert build(tmp_path, alone, columns=(), caption="cls").captions == (("7",),)

    beside = shard_of(tmp_path / "beside", {"seg.png": other, "png": one, "txt": b"x"})
    np.testing.assert_array_equal(build(tmp_path, beside, columns=()).pixels[0], images.pixels[0])

    several = {"input.png": one, "edited.png": other, "txt": b"x"}
    pairs = shard_of(tmp_path / "pairs", several, {"txt": b"y", "input.png": other})
    with pytest.raises(ValueError, match=r"holds 2 images \('edited\.png', 'input\.png'\).*the option 'image'"):
        build(tmp_path, pairs, columns=())
    with pytest.raises(
        ValueError, match=r"no member 'jpg' \(the option 'image'\), only 'edited\.png', 'input\.png', 'txt'"
    ):
        build(tmp_path, pairs, columns=(), image="jpg")
    chosen = build(tmp_path, pairs, columns=(), image=".Input.PNG")
    assert chosen.ids == ("s/0", "s/1")
    np.testing.assert_array_equal(chosen.pixels[0], images.pixels[0])

    later = shard_of(tmp_path / "later", {"png": one, "txt": b"x"}, several)
    assert build(tmp_path, later, store="later", columns=()).ids == ("s/0",)
    (problem,) = problems(tmp_path, "later")
    assert (problem.name, problem.kind) == ("x.tar: s/1", SEVERAL_IMAGES)
    hostile = {f"a{number}.png": one for number in range(50)}
    (sample,) = read_shard(shard_of(tmp_path / "hostile", hostile) / "x.tar")
    assert isinstance(sample, ShardSample)
    assert len(sample.members) == 8, "what a sample may hold in memory is bounded"


def test_columns_and_captions_come_from_json_members(tmp_path: Path, folder: Path) -> None:
    facts = {"caption": "of json", "url": "http://x", "terms": "CC0", "author": 5}
    shards = shard_of(folder, {"jpg": jpeg_of(1, (8, 8)), "json": json.dumps(facts).encode()})
    images = build(tmp_path, shards, columns=("url", "author", "nothing"), license="terms")
    assert images.captions == (("of json",),)
    got = {name: column[0] for name, column in images.columns.items()}
    assert got == {"url": "http://x", "author": "5", "nothing": "", "license": "CC0", "shard": "x.tar"}


def test_an_empty_shard_is_an_error(tmp_path: Path, folder: Path, keys: list[list[str]]) -> None:
    for content in (b"", bytes(10240)):
        (folder / "00003.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"00003\.tar is an empty shard"):
            build(tmp_path, folder)
    assert not (tmp_path / "store").exists()


def test_bad_folders_and_tables_are_refused_before_anything_is_decoded(
    tmp_path: Path, folder: Path, keys: list[list[str]]
) -> None:
    with pytest.raises(ValueError, match=r"nothing holds no shard"):
        build(tmp_path, folder / "nothing")
    with pytest.raises(ValueError, match=r"00000\.parquet has no column 'punsafe', only 'key', 'caption', 'url'"):
        build(tmp_path, folder, columns=("punsafe",))
    with pytest.raises(ValueError, match=r"has no column 'terms'"):
        build(tmp_path, folder, license="terms")
    with pytest.raises(ValueError, match=r"'shard' is a reserved column name"):
        build(tmp_path, folder, columns=("shard",))
    with pytest.raises(ValueError, match=r"subset names 1 keys .*'no'; keys look like '000000000'"):
        build(tmp_path, folder, subset=["no", keys[0][0]])
    with pytest.raises(ValueError, match=r"and name at least one"):
        build(tmp_path, folder, subset=[])
    write_table(folder, "00002", keys[1])
    with pytest.raises(ValueError, match=r"10 image ids occur more than once: '000010000'"):
        build(tmp_path, folder)
    (folder / "00002.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"00002\.parquet is not a readable parquet file"):
        build(tmp_path, folder)
    pq.write_table(pa.table({"url": ["x"]}), folder / "00002.parquet")
    with pytest.raises(ValueError, match=r"00002\.parquet has no column 'key'"):
        build(tmp_path, folder)
    assert not (tmp_path / "store").exists()


def test_nothing_usable_is_an_error(tmp_path: Path, folder: Path) -> None:
    write_shard(folder, plain([("a.jpg", b"x"), ("a.txt", b"x")]), ["a"])
    with pytest.raises(ValueError, match=r"None of the images can be used: 1 images that cannot be decoded"):
        build(tmp_path, folder)


@pytest.mark.parametrize("places", [1, 2, 4, 7])
def test_shards_are_shared_out_without_duplicates_or_gaps(
    tmp_path: Path, folder: Path, keys: list[list[str]], places: int
) -> None:
    plan = plan_shards(folder, SMALL)
    shares = [assign_parts(plan.paths, place, places) for place in range(places)]
    read = Counter(
        sample.id
        for share in shares
        for shard in share
        for sample in decode_shard(shard, SMALL)
        if isinstance(sample, Sample)
    )
    assert read == Counter(key for several in keys for key in several)
    with pytest.raises(ValueError, match=r"Worker 4 of 4 does not exist"):
        assign_parts(plan.paths, 4, 4)


def test_two_nodes_of_two_workers_make_what_one_makes(
    tmp_path: Path, folder: Path, keys: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = build(tmp_path, folder, "alone")
    decoded: list[str] = []

    def counting(shard: Path, *rest: Any) -> Any:
        decoded.append(shard.name)
        return decode_shard(shard, *rest)

    monkeypatch.setattr(webdataset, "decode_shard", counting)
    options = ShardOptions(size=8, workers=2)
    for node in (1, 0):
        decode_shards(
            Store(tmp_path / "store"), shards=plan_shards(folder, options), options=options, place=node, places=2
        )
    assert sorted(decoded) == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
    together = build(tmp_path, folder)
    assert len(decoded) == 4, "joining decodes nothing again"
    assert (together.ids, together.captions, together.fingerprint) == (alone.ids, alone.captions, alone.fingerprint)
    np.testing.assert_array_equal(together.pixels, alone.pixels)


@pytest.mark.parametrize("stop", [1, 13, 40])
def test_an_interrupted_run_keeps_its_finished_shards(
    tmp_path: Path, folder: Path, keys: list[list[str]], stop: int
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    store, seen = Store(tmp_path / "store"), []
    with pytest.raises(KeyboardInterrupt):
        build_laion(store, folder=folder, options=SMALL, progress=interrupt)
    made = build_laion(store, folder=folder, options=SMALL, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == ((stop - 1) // 10 * 10 + 1, 40)
    assert made.fingerprint == build(tmp_path, folder, "other").fingerprint


def test_a_subset_reads_only_the_shards_that_hold_it(
    tmp_path: Path, folder: Path, keys: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original: Callable[..., Any] = webdataset.read_shard
    monkeypatch.setattr(webdataset, "read_shard", lambda path, *rest: read.append(path.name) or original(path, *rest))
    chosen = [keys[3][9], keys[1][4]]
    part = build(tmp_path, folder, subset=chosen)
    assert part.ids == (keys[1][4], keys[3][9])
    assert read == ["00001.tar", "00003.tar"]
    assert not problems(tmp_path), "what is not wanted is not missing"


def test_data_module(tmp_path: Path, folder: Path, keys: list[list[str]]) -> None:
    every = [key for several in keys for key in several]
    (tmp_path / "keys.txt").write_text("\n".join(every[:30]))
    data = LAION(
        str(folder),
        options=SMALL,
        subset=str(tmp_path / "keys.txt"),
        validation_share=0.2,
        store=str(tmp_path / "store"),
        batch_size=4,
    )
    data.prepare_data()
    data.setup()
    assert sorted(data.train_images.ids + data.validation_images.ids) == every[:30]
    assert len(data.validation_images) > 0


def test_the_pipeline_attributes_to_shards_and_trusts_no_caption(tmp_path: Path, folder: Path) -> None:
    keys = [f"00000{index:04d}" for index in range(12)]
    hostile = b"<script>alert(1)</script> ../../etc/passwd"
    write_shard(
        folder,
        plain([part for k in keys for part in ((f"{k}.jpg", jpeg_of(int(k), (16, 12))), (f"{k}.txt", hostile))]),
        keys,
    )
    data = {
        "class_path": "LAION",
        "init_args": {"folder": str(folder), "options": {"size": 8}, "validation_share": 0.3},
    }
    config = attribution_config(tmp_path, "run", data=data, attributor={"class_path": "PixelSimilarity"})
    evaluate.main(["attribute", "-c", str(config)])
    ranked = set(pq.read_table(tmp_path / "run" / "ranking.parquet")["image"].to_pylist())
    train, held_out = split_images(build_laion(Store(tmp_path / "store"), folder=folder, options=SMALL), 0.3)
    assert ranked == set(train.ids)
    assert sorted([*train.ids, *held_out.ids]) == keys
    page = (tmp_path / "run" / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page
