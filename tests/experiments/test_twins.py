"""The two images of a query: found by caption, and counted at both ends of a ranking."""

from __future__ import annotations

from experiments.twins import by_size, ranks, shares, twins


def test_own_image_and_twin_are_found_by_caption() -> None:
    captions = {
        "a": "fox, red style",
        "b": "fox, blue style",
        "c": "fox face, blue style",
        "d": "hen, up, red style",
    }
    assert twins(captions, "fox, red style") == ("a", "b")
    assert twins(captions, "fox face, red style") == (None, "c"), "held out"
    assert twins(captions, "hen, up, red style") == ("d", None), "in one style only"
    assert ranks(["c", "b", "a"], ["a", None, "c"]) == [2, None, 0]


def test_size_forgets_the_sign() -> None:
    assert by_size(["a", "b", "c", "d"], [2.0, 1.0, -1.0, -3.0]) == ["d", "a", "b", "c"]


def test_both_ends_are_counted() -> None:
    assert shares([0, 1, 2, 7, 8, 9, None], 10, 2) == {"n": 6, "first": 2, "last": 2}
