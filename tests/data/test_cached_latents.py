"""Ready-made latents and text states: layout, mapping, fit with the ids, and use in place of an encoder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import evaluate
from datamodules import MSCOCO
from datamodules.mscoco import ReadyMade
from tests.support.tiny import LENGTH, attribution_config
from tests.support.worlds import make_coco
from wherefrom.data.cached_latents import read_cached_latents
from wherefrom.data.encoded_images import EncodedImages, LatentVisits, encode_image_set
from wherefrom.data.mscoco import CocoOptions, build_mscoco
from wherefrom.models.conditioning import PROMPT
from wherefrom.models.pipeline import load_model
from wherefrom.runtime.artifacts import Store
from wherefrom.training.keyed_batches import Visit

COUNT, CAPTIONS = 7, 5
IDS = [str(index * 3) for index in range(COUNT)]


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, Any]:
    random = np.random.default_rng(0)
    written = {
        "latents": random.normal(size=(2 * COUNT, 4, 4, 4)).astype(np.float16),
        "states": random.normal(size=(COUNT, CAPTIONS, 6, 12)).astype(np.float32),
        "null": random.normal(size=(1, 6, 12)).astype(np.float32),
    }
    for name, array in written.items():
        np.save(tmp_path / f"{name}.npy", array)
    return written


@pytest.fixture
def read(tmp_path: Path, arrays: dict[str, Any]) -> Callable[..., EncodedImages]:
    def read(ids: list[str] = IDS, **options: Any) -> EncodedImages:
        return read_cached_latents(tmp_path / "latents.npy", tmp_path / "states.npy", ids, **options)

    return read


def test_mirror_images_come_after_the_images(read: Callable[..., EncodedImages], arrays: dict[str, Any]) -> None:
    made = read()
    assert made.ids == tuple(IDS)
    assert made.groups[0].latents.shape == (COUNT, 2, 4, 4, 4)
    for row in range(COUNT):
        for flip in range(2):
            assert np.array_equal(made.groups[0].latents[row, flip], arrays["latents"][row + flip * COUNT])
    assert np.array_equal(made.groups[0].conditioning[PROMPT], arrays["states"])
    assert made.images.pixels.shape == (COUNT, 32, 32, 3)
    assert made.images.pixels.base.nbytes <= 8, "the grey images take no memory"
    part = made.subset([4, 1])
    assert np.array_equal(part.groups[0].latents[0, 1], arrays["latents"][4 + COUNT])


def test_nothing_is_read_but_what_is_used(
    tmp_path: Path, read: Callable[..., EncodedImages], arrays: dict[str, Any]
) -> None:
    made = read()
    np.load(tmp_path / "latents.npy", mmap_mode="r+")[COUNT + 2] = 7  # seen through the map: it is no copy
    assert (made.groups[0].latents[2, 1] == 7).all()


def test_training_without_the_empty_caption(
    tmp_path: Path, read: Callable[..., EncodedImages], arrays: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"caption_dropout needs the states of the empty caption"):
        LatentVisits(read(), seed=0)
    batch = LatentVisits(read(), seed=0, caption_dropout=0.0).__getitems__([Visit(row, 0) for row in range(COUNT)])
    assert batch.conditioning[PROMPT].isfinite().all()
    assert batch.latents.dtype == torch.float32
    dropped = LatentVisits(read(null_states=tmp_path / "null.npy"), seed=0, caption_dropout=1.0).__getitems__(
        [Visit(0, 0)]
    )
    assert np.array_equal(dropped.conditioning[PROMPT], arrays["null"])


def test_the_fingerprint_follows_ids_and_numbers(tmp_path: Path, read: Callable[..., EncodedImages]) -> None:
    first = read().fingerprint
    assert read().fingerprint == first
    assert read(IDS[::-1]).fingerprint != first
    assert read(null_states=tmp_path / "null.npy").fingerprint != first
    np.load(tmp_path / "states.npy", mmap_mode="r+")[3, 0, 0, 0] += 1
    assert read().fingerprint != first


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, read: Callable[..., EncodedImages]) -> None:
    with pytest.raises(ValueError, match=r"latents\.npy holds torch\.float16 of shape \(14, 4, 4, 4\), but .*\(12, C"):
        read(IDS[:6])
    with pytest.raises(ValueError, match=r"2 image ids|1 image ids occur more than once"):
        read([*IDS[:6], IDS[0]])
    with pytest.raises(ValueError, match=r"There are no ids"):
        read([])
    with pytest.raises(ValueError, match=r"holds 5 captions of each of 7 images"):
        read(captions=[("a", "b")] * COUNT)
    np.save(tmp_path / "null.npy", np.zeros((4, 12), np.float32))
    with pytest.raises(ValueError, match=r"null\.npy has shape \(4, 12\), but a caption's states .*\(6, 12\)"):
        read(null_states=tmp_path / "null.npy")
    np.save(tmp_path / "states.npy", np.zeros((COUNT, 6, 12), np.float32))
    with pytest.raises(ValueError, match=r"states\.npy holds torch\.float32 of shape \(7, 6, 12\)"):
        read()
    np.save(tmp_path / "states.npy", np.array([{}] * COUNT), allow_pickle=True)
    with pytest.raises(ValueError, match=r"states\.npy is not a readable \.npy file"):
        read()
    (tmp_path / "states.npy").unlink()
    with pytest.raises(ValueError, match=r"states\.npy is not a file"):
        read()


def test_ready_made_arrays_give_the_ranking_of_encoded_images(tmp_path: Path) -> None:
    make_coco(tmp_path / "coco")
    data: dict[str, Any] = {
        "class_path": "MSCOCO",
        "init_args": {"folder": str(tmp_path / "coco"), "options": {"size": 8}, "half": False},
    }

    def scores(name: str) -> dict[str, float]:
        evaluate.main(["attribute", "-c", str(attribution_config(tmp_path, name, data=data))])
        rows = pq.read_table(tmp_path / name / "ranking.parquet").to_pylist()
        return {row["image"]: row["score"] for row in rows}

    encoded = scores("encoded")
    folder, captions = tmp_path / "coco" / "train2017", tmp_path / "coco" / "annotations" / "captions_train2017.json"
    images = build_mscoco(Store(tmp_path / "store"), folder=folder, captions=captions, options=CocoOptions(size=8))
    encoder = load_model(str(tmp_path / "pipeline")).encoder
    assert encoder is not None
    assert encoder.text.length == LENGTH
    made = encode_image_set(images, encoder=encoder, store=Store(tmp_path / "store"))
    own = made.groups[0].latents.numpy()
    np.save(tmp_path / "l.npy", np.concatenate([own[:, 0], own[:, 1]]))
    np.save(tmp_path / "s.npy", made.groups[0].conditioning[PROMPT].numpy())
    data["init_args"]["ready_made"] = {"latents": str(tmp_path / "l.npy"), "states": str(tmp_path / "s.npy")}
    ready = scores("ready")
    assert ready == pytest.approx(encoded, rel=1e-5, abs=1e-9)

    subset = list(images.ids[3:8:2])
    module = MSCOCO(
        str(tmp_path / "coco"),
        options=CocoOptions(size=8),
        subset=subset,
        ready_made=ReadyMade(str(tmp_path / "l.npy"), str(tmp_path / "s.npy")),
        encoder=encoder,
        store=str(tmp_path / "store"),
    )
    shutil.rmtree(tmp_path / "store" / "latents")
    module.setup()
    assert module.train_latents.ids == tuple(subset)
    assert torch.equal(
        module.train_latents.groups[0].latents[1, 1], torch.from_numpy(np.load(tmp_path / "l.npy")[5 + 12])
    )
    assert module.train_latents.images.captions == module.train_images.captions
