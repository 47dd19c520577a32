"""What the benchmarks report of rankings whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import known_answers, loss_increases, method_table, second_order
from wherefrom.attributors import Query, Scores, TrainingData
from wherefrom.data.image_set import ImageSet

NAMES = tuple(f"{style}/{concept:03d}" for style in ("openmoji", "twemoji") for concept in range(100))


def ranked(values: np.ndarray) -> Scores:
    query = Query("query", "prompt", np.zeros((2, 2, 3), dtype=np.uint8))
    return Scores(query, NAMES, values, np.zeros(0), {"alpha": 3.0, "split_half_reliability": 0.5})


def test_loss_increases_are_compared_with_the_default() -> None:
    values = np.arange(200.0)
    flipped = np.where(values < 150, values, 349 - values)  # the 50 best in reverse: the same top 100
    result = {0.2: [ranked(values)], 0.5: [ranked(flipped)], 2.0: [ranked(-values)]}
    rows = loss_increases.compare(result, [NAMES[198]])
    assert [row.own_rank for row in rows.values()] == [[2], [49], [199]]
    assert [row.top_kept for row in rows.values()] == [[1.0], [1.0], [0.0]]
    assert rows[0.2].spearman[0] == pytest.approx(1.0)
    assert rows[2.0].spearman[0] == pytest.approx(-1.0)
    squares = float(((values - flipped) ** 2).sum())
    assert rows[0.5].spearman[0] == pytest.approx(1 - 6 * squares / (200 * (200**2 - 1)))
    assert "| 50% | 3 | 0.97 | 1.00 | 0.50 | 49 |" in loss_increases.table(rows)


def test_the_rank_of_each_target_is_read() -> None:
    values = np.arange(200.0)
    targets = {"own": NAMES[199], "other style": known_answers.other_style(NAMES[199])}
    case = known_answers.Case(ranked(values).query, targets)
    assert known_answers.ranks([ranked(values)], [case], "own")[0] == 0.0
    assert known_answers.ranks([ranked(values)], [case], "other style")[0] == 0.5


def test_a_method_is_measured_by_the_ranks_of_what_must_be_found() -> None:
    query = Query("query", "thing, twemoji style", np.zeros((2, 2, 3), dtype=np.uint8))
    names, styles = NAMES, tuple(name.split("/")[0] for name in NAMES)
    images = ImageSet(names, (("",),) * 200, np.zeros((200, 1, 1, 3), np.uint8), {"style": styles})
    values = np.arange(200.0)  # twemoji first: the last of NAMES scores highest
    results = [
        Scores(query, names, values, np.zeros(0), {"seconds": 2.0}),
        Scores(query, names, -values, np.zeros(0), {"seconds": 3.0, "split_half_reliability": 0.5}),
    ]
    case = known_answers.Case(query, {"own": NAMES[199], "other style": NAMES[99]})
    result = method_table.measure(results, {"own": [case, case]}, TrainingData(images))
    assert result == {
        "own/own": [0.0, 199 / 200],
        "own/other style": [0.5, 0.495],
        "own/same style": [1.0, 0.0],
        "split_half_reliability": [0.5],
        "seconds": [2.0, 3.0],
    }
    checks = ("crossed/own", "crossed/other style", "crossed/prompt's", "held-out/other style")
    record = {"pictures": 1200, "ranks": {**result, **{key: [0.0, 1.0] for key in checks}}}
    row = method_table.table({"abu": record}).splitlines()[-1]
    assert row.startswith("| abu | 1,200 | 50% ± 35% | 0.497 (0.497 ± 0.003) | 0.500 (0.500 ± 0.500) |")
    assert row.endswith("| 0.50 ± 0.50 | 0.50 |")


def test_the_second_order_is_judged_by_where_it_puts_the_exact_first() -> None:
    # Of 300 images the exact first is the bank's last for the first query, and the bank's first for the second.
    exact = np.tile(np.linspace(1, 0, 300), (2, 1))
    bank = exact.copy()
    bank[0, 0] = -10
    ids = [f"{place:03d}" for place in range(300)]
    plain = second_order.measure(exact, second_order.corrected(bank, 0.0), ids, [10])
    mended = second_order.measure(exact, second_order.corrected(bank, 1.0), ids, [10])
    assert plain["first_is_first"] == [0, 1]
    assert plain["first_is_among_the_last"] == [1, 0]
    assert plain["recall"] == {"1": [0.5], "10": [0.95], "100": [0.1]}
    assert plain["recall_both_tails"] == {"1": [1.0], "10": [0.55], "100": [0.055]}
    assert mended["first_is_first"] == [1, 1]
    assert mended["recall"] == {"1": [1.0], "10": [1.0], "100": [0.1]}
    assert all(np.mean(each) == 1 for each in mended["ap"].values())
    np.testing.assert_allclose(second_order.corrected(bank, 2.0)[1], bank[1] + 2 * bank[1] ** 2 / bank[1].std())
