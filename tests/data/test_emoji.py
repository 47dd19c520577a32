"""The emoji world: ids, captions, split and filters."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest

from datamodules import Emoji
from wherefrom.data import emoji
from wherefrom.data.emoji import EmojiOptions, Style, build_emoji, caption, held_out
from wherefrom.data.image_set import ImageSet, keep_indices
from wherefrom.runtime.artifacts import Store


def test_ids_are_style_and_code_points(emoji_images: ImageSet) -> None:
    columns = emoji_images.columns
    assert "twemoji/1f98a" in emoji_images.ids
    assert emoji_images.ids == tuple(f"{s}/{c}" for s, c in zip(columns["style"], columns["concept"], strict=True))
    assert all(re.fullmatch(r"(openmoji|twemoji)/[0-9a-f]+(-[0-9a-f]+)*", name) for name in emoji_images.ids)
    assert list(emoji_images.ids) == sorted(emoji_images.ids)
    assert len(set(emoji_images.ids)) == len(emoji_images) > 2000


def test_captions_follow_the_template(emoji_images: ImageSet) -> None:
    columns = emoji_images.columns
    expected = [(f"{n}, {s} style",) for n, s in zip(columns["name"], columns["style"], strict=True)]
    assert list(emoji_images.captions) == expected
    assert emoji_images.captions[emoji_images.ids.index("twemoji/1f98a")] == (caption("fox", "twemoji"),)


def test_one_concept_has_one_name_and_different_drawings(emoji_images: ImageSet) -> None:
    a, b = (emoji_images.ids.index(f"{style}/1f98a") for style in ("twemoji", "openmoji"))
    assert emoji_images.columns["name"][a] == emoji_images.columns["name"][b] == "fox"
    assert np.abs(emoji_images.pixels[a].astype(int) - emoji_images.pixels[b]).mean() > 5


def test_every_image_names_its_author_and_licence(emoji_images: ImageSet) -> None:
    licences = set(zip(emoji_images.columns["style"], emoji_images.columns["license"], strict=True))
    assert licences == {("twemoji", "CC-BY-4.0"), ("openmoji", "CC-BY-SA-4.0")}
    assert all(emoji_images.columns["author"])


def test_pixels_are_drawings_on_white(emoji_images: ImageSet) -> None:
    pixels = np.asarray(emoji_images.pixels)
    assert pixels.shape == (len(emoji_images), 32, 32, 3)
    assert pixels.dtype == np.uint8
    assert isinstance(emoji_images.pixels, np.memmap)
    # A transparent corner that was not put on white would be black.
    assert np.mean((pixels[:, 0, 0] >= 250).all(-1)) > 0.95
    assert np.mean(pixels.reshape(len(pixels), -1).min(axis=1) < 200) > 0.95


def test_held_out_concepts_stay_in_training_in_the_other_style(emoji_images: ImageSet) -> None:
    train, validation = emoji_images.where("split", "train"), emoji_images.where("split", "validation")
    assert len(train) + len(validation) == len(emoji_images)
    trained = set(train.columns["concept"])
    assert all(concept in trained for concept in validation.columns["concept"])
    assert not set(train.ids) & set(validation.ids)
    assert len(set(validation.columns["concept"])) == len(validation)


def test_held_out_share_is_that_of_the_shared_concepts(emoji_images: ImageSet) -> None:
    counts = Counter(emoji_images.columns["concept"])
    shared = sum(count > 1 for count in counts.values())
    validation = emoji_images.where("split", "validation")
    assert abs(len(validation) - 0.1 * shared) < 4 * math.sqrt(shared * 0.1 * 0.9)
    by_style = Counter(validation.columns["style"])
    assert abs(by_style["twemoji"] - len(validation) / 2) < 4 * math.sqrt(len(validation)) / 2


def test_split_does_not_move_when_images_are_left_out() -> None:
    rows = [(f"{point:x}", style) for point in range(500) for style in ("a", "b")]
    chosen = held_out(rows, 0.2)
    kept = [row for row in rows if int(row[0], 16) % 3]
    assert held_out(kept, 0.2) == chosen & set(kept)
    assert held_out(rows, 0.2) <= held_out(rows, 0.4)
    assert held_out(rows, 0.0) == set()
    assert len(held_out(rows, 1.0)) == 500
    assert held_out([("1f98a", "a")], 1.0) == set()


def test_filters_take_whole_families() -> None:
    def concepts(**options: bool) -> set[str]:
        return {concept for concept, _, _, _ in emoji._rows(EmojiOptions(**options))}

    plain, tones, flags = concepts(), concepts(skin_tones=True), concepts(flags=True)
    assert "1f44d-1f3fd" in tones - plain
    assert all(re.search("1f3f[b-f]", concept) for concept in tones - plain)
    france, scotland, pirate = "1f1eb-1f1f7", "1f3f4-e0067-e0062-e0073-e0063-e0074-e007f", "1f3f4-200d-2620"
    assert {france, scotland, pirate} <= flags - plain
    assert not any(re.search("1f3f[b-f]|1f1(e[6-9a-f]|f)", concept) for concept in plain)
    assert plain < concepts(skin_tones=True, flags=True)


def test_styles_are_chosen() -> None:
    assert {style for _, _, style, _ in emoji._rows(EmojiOptions(styles=("openmoji",)))} == {"openmoji"}


def test_drawing_again_gives_the_same_pixels(emoji_images: ImageSet) -> None:
    rows = list(emoji._rows(EmojiOptions()))
    for index in range(0, len(rows), len(rows) // 15):
        concept, _, style, path = rows[index]
        assert emoji_images.ids[index] == f"{style}/{concept}"
        np.testing.assert_array_equal(emoji._draw(path, 32), emoji_images.pixels[index])


def test_building_twice_draws_once(emoji_store: Store, emoji_images: ImageSet) -> None:
    drawn: list[int] = []
    again = build_emoji(emoji_store, EmojiOptions(styles=("openmoji", "twemoji")), lambda done, _: drawn.append(done))
    assert not drawn
    assert again.ids == emoji_images.ids
    assert again.fingerprint == emoji_images.fingerprint


@pytest.mark.parametrize(
    ("styles", "message"),
    [
        (("twemoji", "nosuch"), "Unknown emoji style 'nosuch'; there are openmoji, twemoji"),
        ((), "at least one"),
        (("twemoji", "twemoji"), "each once"),
    ],
)
def test_styles_that_are_not_there(emoji_store: Store, styles: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_emoji(emoji_store, EmojiOptions(styles=styles))


def test_a_missing_package_is_named(emoji_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    style = Style("wherefrom-no-such-package", "nosuch", "", ".png", "", "")
    monkeypatch.setattr(emoji, "STYLES", {"nosuch": style})
    with pytest.raises(ValueError, match=r"needs the package 'wherefrom-no-such-package': pip install"):
        build_emoji(emoji_store, EmojiOptions(styles=("nosuch",)))


def test_unknown_ids_in_exclude_are_refused(emoji_store: Store, emoji_images: ImageSet) -> None:
    with pytest.raises(ValueError, match=r"1 ids .* such as 'twemoji/nosuch'; its ids look like 'openmoji/"):
        keep_indices(emoji_images.ids, ["twemoji/1f98a", "twemoji/nosuch"])
    with pytest.raises(ValueError, match="twemoji/nosuch"):
        Emoji(store=str(emoji_store.root), exclude=["twemoji/nosuch"]).setup()


def test_exclude_leaves_images_out_of_training_only(emoji_store: Store) -> None:
    whole, less = (Emoji(store=str(emoji_store.root), exclude=out) for out in (None, ["twemoji/1f98a"]))
    whole.setup()
    less.setup()
    assert set(whole.train_images.ids) - set(less.train_images.ids) == {"twemoji/1f98a"}
    assert less.validation_images.ids == whole.validation_images.ids


def test_two_ranges_of_concepts_share_none_and_are_all() -> None:
    def concepts(first: float, last: float) -> set[str]:
        return {concept for concept, _, _, _ in emoji._rows(EmojiOptions(concepts=(first, last)))}

    every, small, large = concepts(0.0, 1.0), concepts(0.0, 0.3), concepts(0.3, 1.0)
    assert small | large == every
    assert not small & large
    assert len(small) / len(every) == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("concepts", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)])
def test_a_range_that_is_none_is_refused(emoji_store: Store, concepts: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=f"concepts must be shares.*given {concepts[0]} and {concepts[1]}"):
        build_emoji(emoji_store, EmojiOptions(concepts=concepts))
