"""Latents and caption states on disk: numbers, resume, float16, views, and what is said before."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny import tiny_encoder, tiny_latents
from wherefrom.data.encoded_images import EncodedImages, LatentGroup, LatentVisits, encode_image_set
from wherefrom.data.image_set import ImageSet
from wherefrom.models.conditioning import PROMPT, Conditioning
from wherefrom.models.encoders import LatentEncoder
from wherefrom.models.pixels import to_float
from wherefrom.runtime import mapped_arrays
from wherefrom.runtime.artifacts import Store, identity_hash
from wherefrom.runtime.mapped_arrays import RowView
from wherefrom.training.keyed_batches import Visit

COUNT = 11


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> LatentEncoder:
    return tiny_encoder(tmp_path_factory.mktemp("encoder") / "text")


def embeddings(data: EncodedImages) -> torch.Tensor:
    """The prompt embeddings of all captions, or a view of them."""
    return data.groups[0].conditioning[PROMPT]


@pytest.fixture
def images() -> ImageSet:
    return ImageSet(
        tuple(f"picture/{index}" for index in range(COUNT)),
        tuple((f"a red square {index}", f"big blue circle {index}", "") for index in range(COUNT)),
        np.random.default_rng(1).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8),
        {"license": ("x",) * COUNT},
        "fingerprint",
    )


def test_every_row_is_that_of_its_image_alone(tmp_path: Path, encoder: LatentEncoder, images: ImageSet) -> None:
    made = encode_image_set(images, encoder=encoder, store=Store(tmp_path), batch_size=4)
    assert made.groups[0].latents.shape == (COUNT, 2, 4, 4, 4)
    assert embeddings(made).shape == (COUNT, 3, 6, 12)
    for index in range(COUNT):
        image = to_float(torch.from_numpy(images.pixels[index]))[None]
        both = torch.cat([encoder.encode_pixels(image), encoder.encode_pixels(image.flip(-1))])
        torch.testing.assert_close(made.groups[0].latents[index], both)
        torch.testing.assert_close(embeddings(made)[index], encoder.text.encode(images.captions[index])[PROMPT])
    torch.testing.assert_close(made.empty[PROMPT], encoder.text.encode([""])[PROMPT][0])


def test_float32_keeps_the_identity_that_it_had(tmp_path: Path, encoder: LatentEncoder, images: ImageSet) -> None:
    before = {"pictures": "fingerprint", "ids": identity_hash({"ids": list(images.ids)}), **encoder.identity()}
    assert encode_image_set(images, encoder=encoder, store=Store(tmp_path)).fingerprint == identity_hash(before)
    assert encode_image_set(images, encoder=encoder, store=Store(tmp_path), half=True).fingerprint != identity_hash(
        before
    )


class InterruptedTestError(Exception):
    pass


@pytest.mark.parametrize("stop", range(1, 7))
def test_an_interrupted_run_goes_on_from_its_last_batch(
    tmp_path: Path, encoder: LatentEncoder, images: ImageSet, stop: int
) -> None:
    calls: list[int] = []

    def interrupt(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == stop:
            raise InterruptedTestError

    store = Store(tmp_path / "store")
    with pytest.raises(InterruptedTestError):
        encode_image_set(images, encoder=encoder, store=store, batch_size=4, progress=interrupt)
    rest: list[int] = []
    made = encode_image_set(
        images, encoder=encoder, store=store, batch_size=4, progress=lambda done, total: rest.append(done)
    )
    assert calls + rest == [4, 8, 11, 4, 8, 11]
    whole = encode_image_set(images, encoder=encoder, store=Store(tmp_path / "other"), batch_size=4)
    assert torch.equal(made.groups[0].latents, whole.groups[0].latents)
    assert torch.equal(embeddings(made), embeddings(whole))
    for kind, segments in (("latents", 1), ("prompt_embeddings", 2)):  # the empty prompt comes first, alone
        (folder,) = (tmp_path / "store" / kind).iterdir()
        names = {"layout.json", "manifest.json"}
        names |= {f"rows-{number:05d}.{end}" for number in range(segments) for end in ("npy", "keys")}
        assert {path.name for path in folder.iterdir()} == names


def test_half_takes_half_and_rounds(tmp_path: Path, encoder: LatentEncoder, images: ImageSet) -> None:
    store = Store(tmp_path)
    said: list[str] = []
    whole = encode_image_set(images, encoder=encoder, store=store)
    half = encode_image_set(images, encoder=encoder, store=store, half=True, log=said.append)
    assert half.groups[0].latents.dtype == embeddings(half).dtype == torch.float16
    assert torch.equal(half.groups[0].latents, whole.groups[0].latents.half())
    assert torch.equal(embeddings(half), embeddings(whole).half())
    size = half.groups[0].latents.nbytes + embeddings(half).nbytes
    assert said == [said[0]]
    assert said[0].startswith(f"latents and prompt embeddings of 11 images: {size / 2**20:.1f} MiB in ")
    batch = LatentVisits(half, seed=0).__getitems__([Visit(3, 0), Visit(1, 2)])
    assert batch.latents.dtype == batch.conditioning[PROMPT].dtype == torch.float32
    expected = LatentVisits(whole, seed=0).__getitems__([Visit(3, 0), Visit(1, 2)])
    assert torch.equal(batch.latents, expected.latents.half().float())


def test_what_float16_does_not_reach_is_refused(tmp_path: Path, encoder: LatentEncoder, images: ImageSet) -> None:
    class Loud:
        text = encoder.text
        identity = encoder.identity

        def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
            return encoder.encode_pixels(pixels) + 70_000

    with pytest.raises(ValueError, match=r"latents of images from 'picture/0' on hold 7e\+04.*without half"):
        encode_image_set(images, encoder=Loud(), store=Store(tmp_path), half=True)


def test_left_out_images_are_not_copied(
    tmp_path: Path, encoder: LatentEncoder, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = encode_image_set(images, encoder=encoder, store=Store(tmp_path))
    assert made.subset(range(COUNT)).groups[0].latents is made.groups[0].latents
    chosen = ["picture/3", "picture/7"]
    copied = made.without(chosen)
    monkeypatch.setattr(mapped_arrays, "_LAZY_FROM", 0)
    lazy: EncodedImages = made.without(chosen)
    assert isinstance(lazy.groups[0].latents, RowView)
    assert isinstance(embeddings(lazy), RowView)
    assert isinstance(lazy.images.pixels, RowView)
    assert lazy.fingerprint == copied.fingerprint
    assert lazy.held_bytes == made.held_bytes == 0
    held = replace(made, mapped=False)
    assert held.held_bytes == 4 * COUNT * (2 * 4 * 4 * 4 + 3 * 6 * 12)
    np.testing.assert_array_equal(np.asarray(lazy.images.pixels), copied.images.pixels)
    visits = [Visit(index, visit) for visit in range(3) for index in range(COUNT - 2)]
    for one, two in zip(
        LatentVisits(lazy, 1).__getitems__(visits), LatentVisits(copied, 1).__getitems__(visits), strict=True
    ):
        both = [(one, two)] if isinstance(one, torch.Tensor) else [(one[name], two[name]) for name in one]
        assert all(torch.equal(*pair) for pair in both)
    assert torch.equal(embeddings(lazy)[:, :1][2, 0], embeddings(copied)[2, 0])
    # Encoding what is a view gives the same again.
    again = encode_image_set(lazy.images, encoder=encoder, store=Store(tmp_path))
    rows = torch.arange(COUNT - 2)
    for flip in (0, 1):
        torch.testing.assert_close(again.latents_at(rows, flip), copied.latents_at(rows, flip))


def encode_counted(
    encoder: LatentEncoder, images: ImageSet, store: Store, **options: Any
) -> tuple[EncodedImages, int, list[str]]:
    """The encoded set, images and mirror images that were encoded for it, and captions."""
    pixels, captions = [0], list[str]()

    class Text:
        def encode(self, several: Sequence[str]) -> Conditioning:
            captions.extend(several)
            return encoder.text.encode(several)

        def __getattr__(self, name: str) -> Any:
            return getattr(encoder.text, name)

    class Whole:
        text, identity = Text(), encoder.identity

        def encode_pixels(self, given: torch.Tensor) -> torch.Tensor:
            pixels[0] += len(given)
            return encoder.encode_pixels(given)

    made = encode_image_set(images, encoder=Whole(), store=store, **options)  # type: ignore[arg-type]
    return made, pixels[0], captions


def test_a_larger_set_encodes_what_is_new_and_a_smaller_one_nothing(
    tmp_path: Path, encoder: LatentEncoder, images: ImageSet
) -> None:
    store = Store(tmp_path)
    first, latents, captions = encode_counted(encoder, images.subset(range(9)), store)
    assert latents == 2 * 9 + 2  # one more to see how large a row is
    assert sorted(set(captions)) == sorted({caption for several in images.captions[:9] for caption in several})
    shuffled = images.subset([10, 3, 9, 0, 1, 2, 4, 5, 6, 7, 8])
    whole, latents, captions = encode_counted(encoder, shuffled, store)
    assert latents == 2 * 2
    assert sorted(captions) == sorted(caption for row in (9, 10) for caption in images.captions[row] if caption)
    for part in (images, images.subset([4, 10, 2]), images.subset(range(9))):
        again, latents, captions = encode_counted(encoder, part, store)
        assert (latents, captions) == (0, [])
        places = torch.tensor([shuffled.ids.index(name) for name in part.ids])
        ours, every = torch.arange(len(part)), whole.conditioning_at(places, slice(None))
        assert torch.equal(again.latents_at(ours, 1), whole.latents_at(places, 1))
        assert torch.equal(again.conditioning_at(ours, slice(None))[PROMPT], every[PROMPT])
    assert torch.equal(embeddings(first), embeddings(again))


def test_rows_that_were_deleted_are_made_again(tmp_path: Path, encoder: LatentEncoder, images: ImageSet) -> None:
    store = Store(tmp_path)
    whole, _, _ = encode_counted(encoder, images, store)
    before = whole.groups[0].latents.clone()
    shutil.rmtree(tmp_path / "latents")
    again, latents, captions = encode_counted(encoder, images, store)
    assert latents == 2 * COUNT + 2
    assert not captions
    assert torch.equal(again.groups[0].latents, before)


def two_shapes(first: EncodedImages, second: EncodedImages, images: ImageSet) -> EncodedImages:
    """Images that stand in turn in the one and the other set."""
    members = (torch.arange(0, len(images), 2), torch.arange(1, len(images), 2))
    return EncodedImages(images, (first.groups[0], second.groups[0]), first.empty, "two shapes", members=members)


def test_two_shapes_are_found_by_position() -> None:
    square, wide, images = tiny_latents(6, 2), tiny_latents(6, 2, seed=1), tiny_latents(12, 2).images
    group = LatentGroup(torch.cat([wide.groups[0].latents] * 2, dim=-1), wide.groups[0].conditioning)
    mixed = two_shapes(square, replace(wide, groups=(group,)), images)
    assert [part.tolist() for part in mixed.by_shape(range(3, 8))] == [[4, 6], [3, 5, 7]]
    for positions in mixed.by_shape(range(12)):
        own = group if positions[0] == 1 else square.groups[0]
        assert torch.equal(mixed.latents_at(positions, 1), own.latents[positions // 2, 1])
        assert torch.equal(mixed.conditioning_at(positions, 1)[PROMPT], own.conditioning[PROMPT][positions // 2, 1])
    every, caption = torch.arange(12), torch.arange(12) % 2
    alone = [mixed.conditioning_at(every[[row]], caption[[row]])[PROMPT] for row in range(12)]
    assert torch.equal(mixed.conditioning_at(every, caption)[PROMPT], torch.cat(alone))
    part = mixed.subset([7, 2, 3])
    assert torch.equal(part.latents_at(torch.tensor([2, 0]), 0), mixed.latents_at(torch.tensor([3, 7]), 0))
    assert torch.equal(part.latents_at(torch.tensor([1]), 0), mixed.latents_at(torch.tensor([2]), 0))
    assert len(mixed.subset([2, 4]).groups) == 1
    with pytest.raises(ValueError, match=r"several shapes \(4×4×4, 4×4×8\), but one is needed"):
        mixed.latents_at(torch.arange(2), 0)
    with pytest.raises(ValueError, match="not the positions of all images, each once"):
        replace(mixed, members=(torch.arange(6), torch.arange(6)))
