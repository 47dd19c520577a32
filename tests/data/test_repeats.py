"""The column `repeats`: what it may hold, what it weighs, and which fingerprints it enters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.folders import make, write_metadata
from tests.support.tiny import tiny_latents
from wherefrom.data.image_folder import build_image_folder
from wherefrom.data.image_set import ImageSet
from wherefrom.data.repeats import parse_repeats
from wherefrom.runtime.artifacts import Store

IMAGES = tiny_latents(4).images


def repeated(*cells: str) -> ImageSet:
    return replace(IMAGES, columns={**IMAGES.columns, "repeats": cells})


def test_weights_are_the_column() -> None:
    images = repeated("3", " 1 ", "10.0", "")
    assert images.weights is not None
    np.testing.assert_array_equal(images.weights, [3.0, 1.0, 10.0, 1.0])
    assert images.weights.dtype == np.float64
    assert images.seen == 15
    part = images.subset([2, 0])
    assert part.weights is not None
    np.testing.assert_array_equal(part.weights, [10.0, 3.0])


@pytest.mark.parametrize("images", [IMAGES, repeated("1", "1", "", "1.0"), repeated("7", "1", "1", "1").subset([1, 3])])
def test_a_set_that_is_seen_once_has_the_fingerprints_that_it_had(images: ImageSet) -> None:
    assert images.weights is None
    assert images.seen == len(images)
    assert images.weighted_fingerprint == images.fingerprint


def test_repeats_enter_only_what_is_averaged() -> None:
    data = tiny_latents(4)
    one, other = (replace(data, images=repeated("2", "1", "1", last)) for last in ("1", "2"))
    assert one.fingerprint == other.fingerprint == data.fingerprint == data.weighted_fingerprint
    assert len({each.weighted_fingerprint for each in (one, other, data)}) == 3
    assert one.images.weighted_fingerprint != other.images.weighted_fingerprint
    assert other.seen == 6


@pytest.mark.parametrize("cell", ["0", "-1", "2.5", "often", "nan", "inf", "1e12"])
def test_what_is_no_whole_number_is_refused(cell: str) -> None:
    with pytest.raises(ValueError, match=r"'repeats' of image 'b' holds .*whole number from 1 on"):
        parse_repeats(["a", "b"], ["1", cell])


def test_a_folder_with_wrong_repeats_is_refused_before_an_image_is_decoded(tmp_path: Path) -> None:
    rows = make(tmp_path / "images")
    (tmp_path / "images" / "0.png").write_bytes(b"no image")
    write_metadata(tmp_path / "images", [{**row, "repeats": "often"} for row in rows])
    with pytest.raises(ValueError, match=r"'repeats' of image '0\.png' holds 'often'"):
        build_image_folder(Store(tmp_path / "store"), tmp_path / "images")


def test_a_folders_column_is_read(tmp_path: Path) -> None:
    rows = make(tmp_path / "images")
    write_metadata(tmp_path / "images", [{**row, "repeats": number} for number, row in enumerate(rows, start=1)])
    images = build_image_folder(Store(tmp_path / "store"), tmp_path / "images")
    assert images.weights is not None
    np.testing.assert_array_equal(images.weights, [1.0, 2.0, 3.0])
