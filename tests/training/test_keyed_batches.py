"""The keyed stream: leaving out, ranks, resume, and draws that belong to (seed, id, visit)."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from tests.support.tiny import one_shape
from wherefrom.data.encoded_images import EncodedImages, LatentVisits
from wherefrom.data.image_set import ImageSet
from wherefrom.models.conditioning import PROMPT
from wherefrom.models.pixels import to_float
from wherefrom.runtime import keyed_random
from wherefrom.training.keyed_batches import (
    KeyedBatches,
    LatentBatch,
    PixelVisits,
    Visit,
    flips,
    visit_keys,
    visit_times,
)

IDS = tuple(f"set/{index:02}" for index in range(23))


def stream(ids: tuple[str, ...] = IDS, batch_size: int = 8, steps: int = 30, **options: int) -> KeyedBatches:
    return KeyedBatches(keyed_random.hash_texts(ids), seed=5, batch_size=batch_size, steps=steps, **options)


def named(batches: KeyedBatches, ids: tuple[str, ...] = IDS) -> list[tuple[str, int]]:
    return [(ids[index], visit) for batch in batches for index, visit in batch]


def test_every_epoch_visits_every_image_once() -> None:
    visits = named(stream(steps=23))  # 23 * 8 visits are exactly 8 epochs of 23 images
    assert Counter(visits) == Counter((name, epoch) for epoch in range(8) for name in IDS)
    assert [epoch for _, epoch in visits] == sorted(epoch for _, epoch in visits)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(stream().order(epoch)) for epoch in range(50)]
    other = KeyedBatches(keyed_random.hash_texts(IDS), seed=6, batch_size=8, steps=1)
    assert len({*orders, tuple(other.order(0))}) == 51
    # Each image's mean place over the epochs is that of a uniform one.
    places = np.argsort(np.array([stream().order(epoch) for epoch in range(400)]), axis=1).mean(0)
    assert np.abs(places - 11).max() < 4.5 * math.sqrt((23**2 - 1) / 12 / 400)


def test_leaving_images_out_changes_nothing_else() -> None:
    out = {IDS[3], IDS[4], IDS[19]}
    kept = tuple(name for name in IDS if name not in out)
    whole, less = named(stream(steps=23)), named(stream(kept, steps=20), kept)  # both are 8 whole epochs
    assert [visit for visit in whole if visit[0] not in out] == less


def test_the_order_belongs_to_ids_and_not_to_positions() -> None:
    shuffled = tuple(IDS[index] for index in torch.randperm(23, generator=torch.Generator().manual_seed(0)))
    assert named(stream(shuffled), shuffled) == named(stream())


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_partition_each_batch(world: int) -> None:
    whole = list(stream())
    ranks = [list(stream(rank=rank, world_size=world)) for rank in range(world)]
    for step, batch in enumerate(whole):
        parts = [ranks[rank][step] for rank in range(world)]
        assert {len(part) for part in parts} == {8 // world}
        assert [parts[place % world][place // world] for place in range(8)] == batch


@pytest.mark.parametrize("start", [0, 1, 7, 29, 30])
def test_resuming_yields_the_tail(start: int) -> None:
    assert list(stream(start_step=start)) == list(stream())[start:]
    assert list(stream(start_step=start, rank=1, world_size=2)) == list(stream(rank=1, world_size=2))[start:]


def test_iterating_again_starts_again() -> None:
    batches = stream()
    assert list(batches) == list(batches)
    assert len(list(batches)) == len(batches) == 30


def test_a_batch_may_be_larger_than_the_set() -> None:
    assert named(stream(batch_size=50, steps=2)) == named(stream(batch_size=10, steps=10))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 8 is not a multiple of the 3 processes"):
        stream(world_size=3)
    with pytest.raises(ValueError, match="training set is empty"):
        stream(())


def test_to_float_maps_bytes_to_plus_minus_one() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    floats = to_float(pixels)
    assert floats.shape == (1, 3, 16, 16)
    assert floats.dtype == torch.float32
    assert floats.min() == -1
    assert floats.max() == 1
    torch.testing.assert_close((floats[0, 0].flatten() + 1) * 127.5, torch.arange(256.0))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_flip_share(share: float) -> None:
    count = 20_000
    keys = visit_keys(0, torch.arange(count), torch.zeros(count, dtype=torch.int64))
    result = flips(keys, share).double().mean().item()
    assert abs(result - share) <= 4 * math.sqrt(share * (1 - share) / count)


def test_visit_times_step_by_the_golden_ratio_from_a_keyed_start() -> None:
    ids = keyed_random.hash_texts(IDS)[:, None].expand(-1, 40).flatten()
    times = visit_times(3, ids, torch.arange(40).repeat(23)).reshape(23, 40).double()
    assert times.min() >= 0
    assert times.max() < 1
    steps = torch.remainder(times[:, 1:] - times[:, :-1], 1.0)
    torch.testing.assert_close(steps, torch.full_like(steps, (math.sqrt(5) - 1) / 2), rtol=0, atol=1e-5)
    assert times[:, 0].unique().numel() == 23
    # Three-gap theorem: 40 visits leave no gap above 1/25 (golden ratio to the power -6 and -7 are near 1/18 and 1/29).
    gaps = times.sort(dim=1).values.diff(dim=1)
    assert gaps.max() < ((math.sqrt(5) - 1) / 2) ** 6


def test_pixel_visits_mirror_by_key() -> None:
    pixels = torch.randint(0, 256, (23, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = PixelVisits(pixels, keyed_random.hash_texts(IDS), seed=2)
    visits = [Visit(index, visit) for visit in range(8) for index in range(23)]
    batch = data.__getitems__(visits)
    mirrored = 0
    for (index, visit), key, seen in zip(visits, batch.keys, batch.pixels, strict=True):
        assert key == keyed_random.combine(2, keyed_random.hash_text(IDS[index]), visit)
        plain = to_float(pixels[index])
        flip = bool(flips(key[None], 0.5))
        assert torch.equal(seen, plain.flip(-1) if flip else plain)
        mirrored += flip
    assert abs(mirrored - 92) < 4 * math.sqrt(184) / 2


@pytest.fixture
def latents() -> EncodedImages:
    """Latents are position + 0.5 for the mirror image; embeddings are 100 * position + caption, or -1 for none."""
    count, captions = len(IDS), 3
    number = torch.arange(count, dtype=torch.float32)
    mirror = torch.tensor([0.0, 0.5])
    return one_shape(
        ImageSet(IDS, tuple(("a", "b", "c") for _ in IDS), np.zeros((count, 1, 1, 3), np.uint8)),
        (number[:, None] + mirror)[..., None, None, None].expand(count, 2, 2, 3, 3),
        (100 * number[:, None] + torch.arange(captions))[..., None, None].expand(count, captions, 4, 5),
        torch.full((4, 5), -1.0),
        "fingerprint",
    )


def rows(batch: LatentBatch) -> list[tuple[float, ...]]:
    return [
        (*(part.item() for part in (key, time)), *latent.flatten().tolist(), *conditioning.flatten().tolist())
        for key, time, latent, conditioning in zip(*batch[:3], batch.conditioning[PROMPT], strict=True)
    ]


def test_a_visit_draws_the_same_whatever_the_batch(latents: EncodedImages) -> None:
    data = LatentVisits(latents, seed=4)
    visits = [Visit(index, visit) for visit in range(4) for index in range(23)]
    alone = {visit: rows(data.__getitems__([visit]))[0] for visit in visits}
    shuffled = [visits[index] for index in torch.randperm(len(visits), generator=torch.Generator().manual_seed(0))]
    for size in (7, 64, 92):
        for start in range(0, len(shuffled), size):
            part = shuffled[start : start + size]
            assert rows(data.__getitems__(part)) == [alone[visit] for visit in part]


def test_a_visit_draws_the_same_when_other_images_are_left_out(latents: EncodedImages) -> None:
    less = latents.without(IDS[2:9:3])
    whole, part = LatentVisits(latents, seed=4), LatentVisits(less, seed=4)
    for visit in range(6):
        expected = whole.__getitems__([Visit(IDS.index(name), visit) for name in less.ids])
        assert rows(part.__getitems__([Visit(index, visit) for index in range(len(less))])) == rows(expected)


def test_visits_mix_mirror_images_and_captions_in_their_shares(latents: EncodedImages) -> None:
    data = LatentVisits(latents, seed=4, flip_share=0.5, caption_dropout=0.25)
    visits = [Visit(index, visit) for visit in range(200) for index in range(23)]
    batch = data.__getitems__(visits)
    index = torch.tensor([visit.position for visit in visits])
    mirrored = (batch.latents[:, 0, 0, 0] - index) == 0.5
    dropped = batch.conditioning[PROMPT][:, 0, 0] == -1
    caption = batch.conditioning[PROMPT][~dropped][:, 0, 0] - 100 * index[~dropped]
    assert torch.equal(batch.latents[:, 0, 0, 0].floor().long(), index)
    assert set(caption.tolist()) == {0, 1, 2}
    count = len(visits)
    for result, share, trials in (
        (mirrored.sum(), 0.5, count),
        (dropped.sum(), 0.25, count),
        ((mirrored & dropped).sum(), 0.125, count),
        *(((caption == which).sum(), 1 / 3, len(caption)) for which in range(3)),
    ):
        assert abs(result.item() - trials * share) < 4 * math.sqrt(trials * share * (1 - share))


def test_without_flips_and_dropout_visits_are_plain(latents: EncodedImages) -> None:
    data = LatentVisits(latents, seed=4, flip_share=0.0, caption_dropout=0.0)
    batch = data.__getitems__([Visit(5, visit) for visit in range(99)])
    assert (batch.latents == 5).all()
    assert (batch.conditioning[PROMPT] != -1).all()


def test_seeds_draw_differently(latents: EncodedImages) -> None:
    visits = [Visit(index, 0) for index in range(23)]
    one, two = (rows(LatentVisits(latents, seed).__getitems__(visits)) for seed in (1, 2))
    assert not set(one) & set(two)


def test_a_subset_has_a_fingerprint_of_its_own(latents: EncodedImages) -> None:
    prints = [latents.subset(chosen).fingerprint for chosen in ([0, 1], [1, 0], [0], list(range(23)))]
    assert len({latents.fingerprint, *prints}) == 5
    assert latents.subset([0, 1]).fingerprint == prints[0]
    assert latents.without(()) is latents
    with pytest.raises(ValueError, match="nosuch"):
        latents.without(["nosuch"])


REPEATS = torch.tensor([1 + (index % 4) for index in range(23)])


def repeated(ids: tuple[str, ...] = IDS, steps: int = 30, **options: int) -> KeyedBatches:
    chosen = REPEATS[[IDS.index(name) for name in ids]]
    return KeyedBatches(
        keyed_random.hash_texts(ids), seed=5, batch_size=8, steps=steps, repeats=chosen.tolist(), **options
    )


def test_an_epoch_visits_an_image_as_often_as_its_repeats_say() -> None:
    size = int(REPEATS.sum())
    visits = named(repeated(steps=size))  # 8 whole epochs
    for epoch in range(8):
        own = Counter(name for name, _ in visits[epoch * size : (epoch + 1) * size])
        assert own == dict(zip(IDS, REPEATS.tolist(), strict=True))
    # Each visit has a number, and so timestep and noise, of its own.
    counted = dict(zip(IDS, REPEATS.tolist(), strict=True))
    assert Counter(visits) == Counter((name, visit) for name in IDS for visit in range(8 * counted[name]))


def test_copies_of_an_image_lie_anywhere_in_an_epoch() -> None:
    batches = repeated(steps=1)
    places = np.array([np.argsort(batches.order(epoch)) for epoch in range(400)])
    (rows,) = np.nonzero(batches.positions.numpy() == 3)
    assert len(rows) == 4
    last = len(batches.positions) - 1
    assert np.abs(places[:, rows].mean(0) - last / 2).max() < 4.5 * math.sqrt(((last + 1) ** 2 - 1) / 12 / 400)
    assert np.abs(np.corrcoef(places[:, rows].T)[np.triu_indices(4, 1)] + 1 / last).max() < 4.5 / math.sqrt(400)


def test_leaving_images_out_takes_all_their_copies_and_nothing_else() -> None:
    out = {IDS[3], IDS[4], IDS[19]}
    kept = tuple(name for name in IDS if name not in out)
    size, less_size = int(REPEATS.sum()), sum(int(REPEATS[IDS.index(name)]) for name in kept)
    whole, less = named(repeated(steps=size)), named(repeated(kept, steps=less_size), kept)
    assert [visit for visit in whole if visit[0] not in out] == less


def test_images_seen_once_are_visited_as_in_a_set_without_repeats() -> None:
    ones = KeyedBatches(keyed_random.hash_texts(IDS), seed=5, batch_size=8, steps=30, repeats=[1] * 23)
    assert list(ones) == list(stream())
    first = {name for name in IDS if REPEATS[IDS.index(name)] == 1}
    with_copies = named(repeated(steps=int(REPEATS.sum())))  # both are 8 whole epochs
    assert [visit for visit in with_copies if visit[0] in first] == [
        v for v in named(stream(steps=23)) if v[0] in first
    ]


def test_an_image_that_is_never_visited_is_refused() -> None:
    with pytest.raises(ValueError, match="visits each of the 23 images at least once"):
        KeyedBatches(keyed_random.hash_texts(IDS), seed=5, batch_size=8, steps=1, repeats=(REPEATS - 1).tolist())
