"""Aspect buckets: the rule of sd-scripts, written down once more as it stands there."""

from __future__ import annotations

import math
import random

import pytest

from wherefrom.data.aspect_buckets import Buckets


def buckets_of_sd_scripts(resolution: int, shortest: int, longest: int, step: int) -> list[tuple[int, int]]:
    """`make_bucket_resolutions`: (width, height)."""
    side = int(math.sqrt(resolution**2) // step) * step
    found, width = {(side, side)}, shortest
    while width <= longest:
        height = min(longest, int((resolution**2 // width) // step) * step)
        if height >= shortest:
            found |= {(width, height), (height, width)}
        width += step
    return sorted(found)


def place_in_sd_scripts(buckets: list[tuple[int, int]], width: int, height: int) -> list[tuple[int, int]]:
    """`BucketManager.select_bucket` with enlarging: the bucket, and the size before the crop; (width, height)."""
    ratio = width / height
    bucket = (width, height)
    if bucket not in buckets:
        errors = [abs(w / h - ratio) for w, h in buckets]
        bucket = buckets[errors.index(min(errors))]
    scale = bucket[1] / height if ratio > bucket[0] / bucket[1] else bucket[0] / width
    return [bucket, (int(width * scale + 0.5), int(height * scale + 0.5))]


def reduced_in_sd_scripts(resolution: int, step: int, width: int, height: int) -> list[tuple[int, int]]:
    """The same without enlarging (`bucket_no_upscale`)."""

    def rounded(side: float) -> int:
        return int(side + 0.5) - int(side + 0.5) % step

    ratio, resized = width / height, (width, height)
    if width * height > resolution**2:
        wide = math.sqrt(resolution**2 * ratio)
        high = resolution**2 / wide
        by_width, by_height = rounded(wide), rounded(high)
        if abs(by_width / rounded(by_width / ratio) - ratio) < abs(rounded(by_height * ratio) / by_height - ratio):
            resized = by_width, int(by_width / ratio + 0.5)
        else:
            resized = int(by_height * ratio + 0.5), by_height
    return [(resized[0] - resized[0] % step, resized[1] - resized[1] % step), resized]


def turned(size: tuple[int, int]) -> tuple[int, int]:
    return size[1], size[0]


@pytest.mark.parametrize(
    ("resolution", "shortest", "longest", "step"),
    [(512, 256, 1024, 64), (768, 256, 1024, 64), (1024, 512, 2048, 64), (640, 320, 960, 32), (64, 32, 128, 8)],
)
def test_images_go_where_sd_scripts_puts_them(resolution: int, shortest: int, longest: int, step: int) -> None:
    made = Buckets(resolution, shortest, longest, step).resolved((1, 1))
    theirs = buckets_of_sd_scripts(resolution, shortest, longest, step)
    assert [turned(size) for size in made.sizes] == theirs
    small = Buckets(resolution, shortest, longest, step, upscale=False).resolved((1, 1))
    draw = random.Random(0)
    for _ in range(300):
        width, height = draw.randint(step, 3 * resolution), draw.randint(step, 3 * resolution)
        if max(width, height) < 8 * min(width, height):
            place = [turned(size) for size in made.place((height, width))]
            assert place == place_in_sd_scripts(theirs, width, height)
            place = [turned(size) for size in small.place((height, width))]
            assert place == reduced_in_sd_scripts(resolution, step, width, height)


@pytest.mark.parametrize("upscale", [True, False])
def test_a_bucket_is_covered_and_in_whole_steps(upscale: bool) -> None:
    made = Buckets(64, 32, 128, 8, upscale).resolved((64, 64))
    for height in range(40, 200, 9):
        for width in range(40, 200, 7):
            bucket, resized = made.place((height, width))
            assert all(side % 8 == 0 and side > 0 for side in bucket)
            assert all(side <= before for side, before in zip(bucket, resized, strict=True))
            if upscale:
                assert bucket[0] * bucket[1] <= 64**2
            else:
                assert all(after <= before for after, before in zip(resized, (height, width), strict=True))


def test_what_is_left_out_is_as_in_sd_scripts_and_to_scale_for_small_images() -> None:
    assert Buckets().resolved((512, 512)) == Buckets(512, 256, 1024, 64)
    assert Buckets().resolved((1024, 1024)) == Buckets(1024, 256, 1024, 64)
    assert Buckets().resolved((8, 8), multiple=2) == Buckets(8, 4, 16, 2)
    assert Buckets().resolved((128, 128), multiple=24).step == 24
    assert Buckets().resolved((2048, 2048)).max_side == 2048


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        (Buckets(step=12), "step 12 is no multiple of 8"),
        (Buckets(512, max_side=256), "max_side no smaller"),
        (Buckets(512, min_side=640), "min_side 640 is larger"),
        (Buckets(8, step=16), "step must be no larger"),
    ],
)
def test_numbers_that_make_no_buckets_are_refused(buckets: Buckets, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        buckets.resolved((512, 512), multiple=8)
    with pytest.raises(ValueError, match="min_side is a number of pixels"):
        Buckets(min_side=0)


def test_an_image_without_a_bucket_of_its_own_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"30 × 90 pixels is smaller than a bucket's step, 64.*upscale: true"):
        Buckets(upscale=False).resolved((512, 512)).place((90, 30))
