"""How images are brought to a size: crop, margins, stretching, buckets, EXIF and transparency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.folders import paint
from wherefrom.data.aspect_buckets import Buckets
from wherefrom.data.framing import Framing
from wherefrom.data.image_files import load_image, read_header
from wherefrom.runtime.stable_names import settings_identity


@pytest.fixture
def file(tmp_path: Path) -> Path:
    paint(tmp_path / "x.png", 0, (12, 6))  # width 12, height 6
    return tmp_path / "x.png"


def pixels_of(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_margins_keep_the_whole_image(file: Path) -> None:
    framed = load_image(file, 12, Framing(fit="pad", pad_color="#102030"))
    np.testing.assert_array_equal(framed[3:9], pixels_of(file))
    for margin in (framed[:3], framed[9:]):
        assert (margin == (0x10, 0x20, 0x30)).all()
    assert (load_image(file, 12, Framing(fit="pad"))[0] == 255).all()


def test_stretching_takes_all_and_no_more(file: Path) -> None:
    framed = load_image(file, (12, 4), Framing(fit="stretch"))
    np.testing.assert_array_equal(framed, np.asarray(Image.open(file).resize((4, 12), Image.Resampling.LANCZOS)))


def test_a_size_that_is_not_square_is_covered_and_its_centre_cut_out(file: Path) -> None:
    np.testing.assert_array_equal(load_image(file, (6, 10)), pixels_of(file)[:, 1:11])
    np.testing.assert_array_equal(load_image(file, (2, 12)), pixels_of(file)[2:4])
    larger = np.asarray(Image.open(file).resize((24, 12), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(load_image(file, (12, 18)), larger[:, 3:21])
    np.testing.assert_array_equal(load_image(file, (6, 6)), load_image(file, 6))


def test_an_image_in_its_bucket(file: Path) -> None:
    framing = Framing(buckets=Buckets(8, 4, 16, 2))
    (height, width), resized = framing.place((6, 12), 8)
    assert (height, width) == (4, 8) or height * width <= 64
    whole = np.asarray(Image.open(file).resize(resized[::-1], Image.Resampling.LANCZOS))
    top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
    np.testing.assert_array_equal(load_image(file, 8, framing), whole[top : top + height, left : left + width])


def test_a_square_image_in_its_bucket_is_that_of_the_size_alone(tmp_path: Path) -> None:
    paint(tmp_path / "x.png", 1, (30, 30))
    framed = load_image(tmp_path / "x.png", 8, Framing(buckets=Buckets(8, 4, 16, 2)))
    np.testing.assert_array_equal(framed, load_image(tmp_path / "x.png", 8))


def test_photographs_are_turned_or_left_as_they_are_stored(tmp_path: Path) -> None:
    pixels = paint(tmp_path / "x.png", 0, (5, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "x.png", None), np.rot90(pixels, -1))
    np.testing.assert_array_equal(load_image(tmp_path / "x.png", None, Framing(exif="ignore")), pixels)


def test_transparency_can_be_dropped_as_trainers_do(tmp_path: Path) -> None:
    rgba = np.zeros((1, 2, 4), np.uint8)
    rgba[0] = (10, 20, 30, 0), (40, 50, 60, 255)
    Image.fromarray(rgba).save(tmp_path / "x.png")
    framed = load_image(tmp_path / "x.png", None, Framing(alpha="drop"))
    np.testing.assert_array_equal(framed, np.asarray(Image.open(tmp_path / "x.png").convert("RGB")))
    assert load_image(tmp_path / "x.png", None)[0].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "cover"}, "fit is one of crop, pad, stretch; given 'cover'"),
        ({"exif": "rotate"}, "exif is one of"),
        ({"alpha": "black"}, "alpha is one of"),
        ({"pad_color": "whitish"}, "pad_color is a colour such as white"),
    ],
)
def test_unknown_choices_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Framing(**settings)


def test_buckets_need_an_area() -> None:
    with pytest.raises(ValueError, match="their area is not known"):
        Framing(buckets=Buckets()).resolved(None)
    assert Framing(buckets=Buckets(64)).resolved(None).buckets == Buckets(64, 32, 128, 8)


def test_only_what_differs_enters_an_identity() -> None:
    assert settings_identity(Framing()) == {}
    assert settings_identity(Framing(fit="pad")) == {"fit": "pad"}
    assert settings_identity(Framing(exif="ignore", buckets=Buckets(64, 32, 128, 8))) == {
        "exif": "ignore",
        "buckets": {"resolution": 64, "min_side": 32, "max_side": 128, "step": 8, "upscale": True},
    }


def test_a_header_says_the_size_without_decoding(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:60])  # the header and not one row of pixels
    assert read_header(file) == (6, 12)
    with pytest.raises(OSError, match="truncated"):
        load_image(file, None)
