"""Images of several sizes as one set: indexing, subsets, joining, and what needs one size."""

from __future__ import annotations

import numpy as np
import pytest

from wherefrom.data.copies import Copies, plant
from wherefrom.data.image_set import ImageSet, joined_image_sets
from wherefrom.data.ragged_pixels import RaggedPixels, by_size, join_pixels, sizes_of, stacked, take_pixels

SIZES = [(4, 6), (8, 8), (4, 6), (6, 4), (8, 8), (4, 6)]
IMAGES = [np.random.default_rng(n).integers(0, 256, (*size, 3), dtype=np.uint8) for n, size in enumerate(SIZES)]


def ragged() -> RaggedPixels:
    made = stacked(IMAGES)
    assert isinstance(made, RaggedPixels)
    return made


def image_set(prefix: str = "") -> ImageSet:
    names = tuple(f"{prefix}{n}.png" for n in range(len(IMAGES)))
    return ImageSet(names, (("x",),) * len(names), ragged(), {"license": ("y",) * len(names)}, f"ragged{prefix}")


def test_a_number_is_an_image_and_positions_of_one_size_are_an_array() -> None:
    pixels = ragged()
    assert len(pixels) == 6
    assert pixels.sizes == SIZES
    for position in (*range(6), -1):
        np.testing.assert_array_equal(pixels[position], IMAGES[position])
        np.testing.assert_array_equal(pixels[np.int64(position)], IMAGES[position])
    np.testing.assert_array_equal(pixels[np.array([5, 0])], np.stack([IMAGES[5], IMAGES[0]]))
    np.testing.assert_array_equal(pixels[2:3], IMAGES[2][None])
    assert [each.shape for each in pixels] == [each.shape for each in IMAGES]
    assert pixels.nbytes == sum(each.nbytes for each in IMAGES)


def test_a_selection_of_several_sizes_is_one_again() -> None:
    some = take_pixels(ragged(), np.array([4, 3, 0]))
    assert isinstance(some, RaggedPixels)
    assert some.sizes == [(8, 8), (6, 4), (4, 6)]
    for position, origin in enumerate((4, 3, 0)):
        np.testing.assert_array_equal(some[position], IMAGES[origin])
    again = some[1:]
    np.testing.assert_array_equal(again[1], IMAGES[0])


def test_what_needs_one_size_says_so() -> None:
    pixels = ragged()
    for use in (lambda: pixels.shape, lambda: np.asarray(pixels), lambda: pixels[:, ::-1]):
        with pytest.raises(ValueError, match=r"3 sizes \(6 × 4, 4 × 6, 8 × 8\), but one is needed.*without buckets"):
            use()


def test_sizes_with_their_images() -> None:
    found = {size: (images, where.tolist()) for size, images, where in image_set().by_size()}
    assert {size: where for size, (_, where) in found.items()} == {(4, 6): [0, 2, 5], (8, 8): [1, 4], (6, 4): [3]}
    images, _ = found[8, 8]
    assert images.ids == ("1.png", "4.png")
    np.testing.assert_array_equal(images.pixels, np.stack([IMAGES[1], IMAGES[4]]))
    plain = np.zeros((3, 5, 7, 3), np.uint8)
    assert [(size, where.tolist()) for size, where in by_size(plain)] == [((5, 7), [0, 1, 2])]


def test_joined_sets_hold_the_images_of_both_in_their_order() -> None:
    square = np.zeros((2, 8, 8, 3), np.uint8)
    for pixels, images in (
        (join_pixels(ragged(), square), [*IMAGES, *square]),
        (join_pixels(square, ragged()), [*square, *IMAGES]),
        (join_pixels(ragged()[2:], ragged()[:3]), [*IMAGES[2:], *IMAGES[:3]]),
    ):
        assert sizes_of(pixels) == [each.shape[:2] for each in images]
        for position, image in enumerate(images):
            np.testing.assert_array_equal(pixels[position], image)
    both = joined_image_sets(image_set(), image_set("other"))
    np.testing.assert_array_equal(both.subset([9]).pixels[0], IMAGES[3])
    assert len(both.parts) == 2


def test_copies_have_the_sizes_of_their_originals() -> None:
    planted = plant(image_set(), Copies(["3.png", "1.png"], 1))
    assert planted.sizes == [*SIZES, (6, 4), (8, 8)]
    assert np.abs(planted.pixels[6][1:-1, 1:-1].astype(int)).sum() > 0
