"""Small COCO folders and shards of img2dataset, in their real formats, to test with."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.support.tiny import WORDS

LICENSES = [
    {"url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "id": 1, "name": "Attribution-NonCommercial License"},
    {"url": "http://www.usa.gov/copyright.shtml", "id": 8, "name": "United States Government Work"},
]


def jpeg_of(seed: int, size: tuple[int, int], kind: str = "JPEG") -> bytes:
    """An image of large soft blobs, which JPEG keeps."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(small).resize(size).save(stream, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return stream.getvalue()


def make_coco(folder: Path, train: int = 12, validation: int = 4, captions: int = 5) -> dict[str, dict[str, Any]]:
    """Image folders beside captions files; ids are neither in order nor of one length, captions lie mixed."""
    random = np.random.default_rng(0)
    written = {}
    for split, count, first in (("train2017", train, 9), ("val2017", validation, 200)):
        ids = [int(first + 37 * index % 89 * 11) for index in range(count)]
        images, annotations = [], []
        (folder / split).mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(ids):
            name = f"{image:012d}.jpg"
            size = ((20, 14), (12, 18))[index % 2]
            (folder / split / name).write_bytes(jpeg_of(image, size))
            images.append(
                {
                    "license": (1, 8)[index % 2],
                    "file_name": name,
                    "coco_url": f"http://images.cocodataset.org/{split}/{name}",
                    "height": size[1],
                    "width": size[0],
                    "date_captured": "2013-11-14 17:02:52",
                    "flickr_url": f"http://farm7.staticflickr.com/{image}.jpg",
                    "id": image,
                }
            )
        for number in random.permutation(count * captions):
            image = ids[number % count]
            caption = " ".join(random.choice(WORDS, 4)) + f" {number}"
            annotations.append({"image_id": image, "id": int(number) + 1, "caption": caption})
        written[split] = {"info": {}, "licenses": LICENSES, "images": images, "annotations": annotations}
        write_captions(folder, split, written[split])
    return written


def write_captions(folder: Path, split: str, content: Any) -> Path:
    path = folder / "annotations" / f"captions_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def add_member(tar: tarfile.TarFile, name: str, content: bytes, **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    # As WebDataset's writer does: a time that is no whole number puts a pax header before each member.
    member.size, member.mtime = len(content), 1700000000.25
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content) if member.isreg() else None)


def sample_of(key: str, seed: int, order: int = 0) -> list[tuple[str, bytes]]:
    """The members of a sample, in one of six orders."""
    kind, extension = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[seed % 3]
    caption = f"a big {WORDS[seed % len(WORDS)]} image"
    metadata = {
        "key": key,
        "caption": caption,
        "url": f"http://x/{key}",
        "width": 16,
        "height": 12,
        "status": "success",
    }
    members = [
        (f"{key}.{extension}", jpeg_of(seed, (16, 12), kind)),
        (f"{key}.json", json.dumps(metadata).encode()),
        (f"{key}.txt", caption.encode()),
    ]
    orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    return [members[place] for place in orders[order % 6]]


def make_shards(folder: Path, shards: int = 4, count: int = 10) -> list[list[str]]:
    """Shards of img2dataset with their parquet and stats files; the last row of each could not be downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = []
    for shard in range(shards):
        keys.append([f"{shard:05d}{index:04d}" for index in range(count)])
        with (folder / f"{shard:05d}.tar").open("wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
            for index, key in enumerate(keys[-1]):
                for name, content in sample_of(key, shard * count + index, index):
                    add_member(tar, name, content)
        listed = [*keys[-1], f"{shard:05d}9999"]
        rows = {
            "key": listed,
            "caption": ["a caption"] * len(listed),
            "url": [f"http://x/{key}" for key in listed],
            "LICENSE": ["?" if index % 2 else None for index in range(len(listed))],
            "status": ["success"] * count + ["failed_to_download"],
        }
        pq.write_table(pa.table(rows), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": count + 1, "successes": count}))
    return keys


def write_table(folder: Path, shard: str, keys: list[str], **columns: list[Any]) -> None:
    pq.write_table(pa.table({"key": keys, "url": ["u"] * len(keys), **columns}), folder / f"{shard}.parquet")


def write_shard(folder: Path, members: list[tuple[str, bytes, dict[str, Any]]], keys: list[str]) -> Path:
    """A shard of these members, and a table of these keys."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, content, fields in members:
            add_member(tar, name, content, **fields)
    write_table(folder, "00000", keys)
    return folder / "00000.tar"


def plain(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes, dict[str, Any]]]:
    return [(name, content, {}) for name, content in members]
