"""Near-duplicates in a training set: near, all different, and part of what the set is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from datamodules import Emoji
from wherefrom.data.copies import Copies, plant
from wherefrom.data.emoji import EmojiOptions
from wherefrom.data.image_set import ImageSet


def some(count: int = 5) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    ids = tuple(f"style/{index}" for index in range(count))
    captions = tuple((f"caption {index}",) for index in range(count))
    return ImageSet(ids, captions, pixels, {"license": tuple(map(str, range(count)))}, "some")


def test_copies_come_after_the_images_with_their_captions_and_columns() -> None:
    planted = plant(some(), Copies(["style/3", "style/1"], 2))
    assert planted.ids == (*some().ids, "style/3/copy1", "style/3/copy2", "style/1/copy1", "style/1/copy2")
    assert planted.captions[5:] == (("caption 3",),) * 2 + (("caption 1",),) * 2
    assert planted.columns["license"][5:] == ("3", "3", "1", "1")
    assert np.array_equal(planted.pixels[:5], some().pixels), "the others are as they were"


def test_a_copy_is_its_original_one_pixel_off_and_slightly_recoloured() -> None:
    copies, images = Copies(["style/2"], 8), some()
    planted, original = plant(images, copies), images.pixels[2].astype(int)
    steps = set()
    for copy in planted.pixels[5:].astype(int):
        (step,) = [
            (rows, columns)
            for rows in (-1, 0, 1)
            for columns in (-1, 0, 1)
            if (moved := inner(copy - np.roll(original, (rows, columns), (0, 1)), copy)) is not None
            and np.abs(moved).max() <= 12
        ]
        moved = inner(copy - np.roll(original, step, (0, 1)), copy)
        assert moved is not None
        assert (np.abs(moved) >= 4).all(), "every channel moves"
        steps.add(step)
    assert len(steps) == 8
    assert (0, 0) not in steps


def inner(difference: np.ndarray, copy: np.ndarray) -> np.ndarray | None:
    """What was added to each channel away from the border and from the ends of the scale; None if it is not one."""
    result = []
    for channel in range(3):
        kept = (copy[1:-1, 1:-1, channel] > 0) & (copy[1:-1, 1:-1, channel] < 255)
        values: Sequence[int] = np.unique(difference[1:-1, 1:-1, channel][kept])
        if len(values) != 1:
            return None
        result.append(values[0])
    return np.array(result)


def test_copies_are_part_of_what_the_set_is() -> None:
    def planted(*ids: str, **settings: int) -> ImageSet:
        return plant(some(), Copies(list(ids), **settings))

    one = planted("style/1")
    assert np.array_equal(planted("style/1").pixels, one.pixels)
    assert np.array_equal(planted("style/0", "style/1").pixels[-2:], one.pixels[-2:]), "whoever else has copies"
    others = [planted("style/2"), planted("style/1", seed=1), planted("style/1", count=1), some()]
    assert len({one.fingerprint, *(each.fingerprint for each in others)}) == 5
    assert not np.array_equal(planted("style/1", seed=1).pixels, one.pixels)


def test_copies_of_nothing_are_refused() -> None:
    for settings in ({"ids": []}, {"ids": ["a", "a"]}, {"ids": ["a"], "count": 0}, {"ids": ["a"], "count": 9}):
        with pytest.raises(ValueError, match="copies needs originals, each named once, and 1 to 8"):
            Copies(**settings)
    with pytest.raises(ValueError, match="1 images that are not in the training set, such as 'nobody'"):
        plant(some(), Copies(["nobody"]))
    taken = plant(some(), Copies(["style/1"]))
    with pytest.raises(ValueError, match="occur more than once"):
        plant(taken, Copies(["style/1"]))


def test_the_emoji_world_has_them_in_training_only(tmp_path: Path) -> None:
    options, store = EmojiOptions(size=8, concepts=(0.0, 0.02), validation_share=0.5), str(tmp_path)
    whole = Emoji(options, store=store)
    whole.setup()
    copies = Copies([whole.train_images.ids[7]], 2)
    planted = Emoji(options, store=store, copies=copies, exclude=[copies.planted[0]])
    planted.setup()
    assert planted.train_images.ids == (*whole.train_images.ids, copies.planted[1])
    assert planted.validation_images.ids == whole.validation_images.ids
    held_out = Emoji(options, store=store, copies=Copies([whole.validation_images.ids[0]]))
    with pytest.raises(ValueError, match="not in the training set"):
        held_out.setup()
