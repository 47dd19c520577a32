"""Which images are ranked and which are the null: the default, names of splits, folders, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wherefrom.data.identical_images import identical_images
from wherefrom.data.image_set import ImageSet
from wherefrom.data.ranked_images import RankedImages
from wherefrom.data.split_names import split_named

SPLITS = ("train",) * 3 + ("validation",) * 2 + ("test",)


def images_of(splits: tuple[str, ...] | None = SPLITS, count: int = 6, seed: int = 0) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    columns = {} if splits is None else {"split": splits}
    return ImageSet(tuple(f"{n}.png" for n in range(count)), (("x",),) * count, pixels, columns, f"set {seed}")


def chosen(split: object = None, null: object = "", images: ImageSet | None = None) -> tuple[str, str, list[str]]:
    """Numbers of the ranked images and of the null, and the lines."""
    choice = RankedImages.of_options(split, null)  # type: ignore[arg-type]
    ranked, held, lines = choice.of(images_of() if images is None else images, lambda folder: images_of(None, 2, 5))
    return ("".join(each[0] for each in ranked.ids), "" if held is None else " ".join(held.ids), list(lines))


def test_without_splits_all_are_ranked_and_there_is_no_null() -> None:
    for null in ("", "none", None):
        ranked, held, lines = chosen(null=null, images=images_of(None))
        assert (ranked, held) == ("012345", "")
        assert lines == ["6 images are ranked, and there is no null, so there are no p-values"]


@pytest.mark.parametrize(
    ("split", "null", "ranked", "held"),
    [
        (None, "", "012", "3.png 4.png"),
        ("train", "none", "012", ""),
        ("Training", "Val", "012", "3.png 4.png"),
        (["train", "testing"], "", "0125", "3.png 4.png"),
        (["train", "validation"], "", "01234", ""),
        ("all", "", "012345", ""),
        ("all", "none", "012345", ""),
        ("all", None, "012345", ""),
        ("test", "train", "5", "0.png 1.png 2.png"),
        ((), "test", "012", "5.png"),
    ],
)
def test_splits_are_chosen_by_any_of_their_names(split: object, null: object, ranked: str, held: str) -> None:
    assert chosen(split, null)[:2] == (ranked, held)


def test_what_nobody_asked_for_is_said_with_its_count() -> None:
    assert chosen()[2] == [
        "3 images are ranked: split 'train' (3)",
        "the null, of images never trained on: split 'validation' (2); null: none, split: all ranks them too",
        "left out: split 'test' (1), neither ranked nor the null; name it in split: to rank it too",
    ]
    assert chosen("all")[2] == [
        "6 images are ranked: split 'test' (1), 'train' (3), 'validation' (2)",
        "there is no null, so there are no p-values",
    ]
    assert "null: none" not in " ".join(chosen(null="validation")[2]), "it was asked for"


def test_a_split_of_another_name_is_its_own() -> None:
    odd = images_of(("train",) * 3 + ("dev",) * 2 + ("holdout",))
    assert chosen(null="holdout", images=odd)[:2] == ("012", "5.png")
    assert chosen(null="dev", images=odd)[:2] == ("012", "3.png 4.png"), "not an alias of what is not there"


def test_a_folder_is_the_null_under_ids_of_its_own(tmp_path: Path) -> None:
    ranked, held, lines = chosen(null=tmp_path)
    assert (ranked, held) == ("012", "null/0.png null/1.png")
    assert (
        lines[1]
        == "left out: split 'test' (1), 'validation' (2), neither ranked nor the null; name it in split: to rank it too"
    )
    assert lines[2] == f"the null, of images never trained on: the 2 images of {tmp_path}"
    elsewhere = images_of(None, 3, 9)
    assert chosen(null=elsewhere)[1] == "null/0.png null/1.png null/2.png"
    _, null, _ = RankedImages(null=elsewhere).of(images_of(), lambda folder: elsewhere)
    assert null is not None
    assert null.fingerprint not in ("", elsewhere.fingerprint), "other ids are another set"


@pytest.mark.parametrize(
    ("split", "null", "message"),
    [
        ("holdout", "", r"split: no image has the split 'holdout'; the images' splits are 'test' \(1\), 'train' \(3\)"),
        ("all", "validation", r"null: images of the split 'validation' cannot be ranked and be the null"),
        (None, "train", r"null: images of the split 'train' cannot be ranked"),
        (None, "no/such", r"null: 'no/such' is neither a split of the images \(.*train, validation\), nor a folder"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(split: object, null: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(split, null)


def test_images_without_a_training_split_or_without_splits_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"images: none is for training: the images' splits are 'test' \(6\).*split: all"
    ):
        chosen(images=images_of(("test",) * 6))
    with pytest.raises(ValueError, match=r"split: the images have no splits, so 'train' names none"):
        chosen("train", images=images_of(None))
    with pytest.raises(ValueError, match=r"null: 'test' is neither .*the images have no splits"):
        chosen(null="test", images=images_of(None))
    with pytest.raises(ValueError, match="null: it holds no image"):
        chosen(null=images_of(None).subset([]))


def test_names_of_splits() -> None:
    assert {split_named(name) for name in ("val", "VALID", "dev", "eval", " validation ")} == {"validation"}
    assert (split_named("training"), split_named("Testing"), split_named("other")) == ("train", "test", None)
    assert split_named("dev", {"dev"}) == "dev"


def test_identical_images_are_found_by_all_their_pixels() -> None:
    images = images_of(None, 5)
    near = images.pixels[2].copy()
    near[5, 5, 0] ^= 1  # not among the pixels that are looked at first
    others = [images.pixels[3].copy(), near, np.zeros((3, 3, 3), np.uint8), images.pixels[3].copy()]
    assert identical_images(images, others) == [(3, 0), (3, 3)]
    assert identical_images(images, []) == []
