"""The two images of a query: found by caption, and counted at both ends of a ranking."""

from __future__ import annotations

from experiments.cross_style_counterparts import by_size, own_and_counterpart, ranks, shares


def test_own_image_and_counterpart_are_found_by_caption() -> None:
    captions = {
        "a": "fox, red style",
        "b": "fox, blue style",
        "c": "fox face, blue style",
        "d": "hen, up, red style",
    }
    assert own_and_counterpart(captions, "fox, red style") == ("a", "b")
    assert own_and_counterpart(captions, "fox face, red style") == (None, "c"), "held out"
    assert own_and_counterpart(captions, "hen, up, red style") == ("d", None), "in one style only"
    assert ranks(["c", "b", "a"], ["a", None, "c"]) == [2, None, 0]


def test_size_forgets_the_sign() -> None:
    assert by_size(["a", "b", "c", "d"], [2.0, 1.0, -1.0, -3.0]) == ["d", "a", "b", "c"]


def test_both_ends_are_counted() -> None:
    assert shares([0, 1, 2, 7, 8, 9, None], 10, 2) == {"n": 6, "first": 2, "last": 2}
