"""Tables of scores in parts: the top k is that of the whole, whatever the parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wherefrom.rankings import score_table
from wherefrom.rankings.ranking_file import order_of
from wherefrom.rankings.score_table import ScoreTable

QUERIES = ["fox", "a house"]


def filled(folder: Path, sizes: list[int], scores: np.ndarray, order: list[int] | None = None) -> ScoreTable:
    table = ScoreTable(folder, QUERIES)
    starts = np.cumsum([0, *sizes])
    for number in order or range(len(sizes)):
        rows = range(starts[number], starts[number + 1])
        table.write(number, [name_of(row) for row in rows], scores[:, rows])
    return table


def name_of(row: int) -> str:
    return f"p{row * 7919 % 10007:05d}"


@pytest.mark.parametrize("k", [1, 3, 50, 1000, 5000])
@pytest.mark.parametrize("sizes", [[1000], [1, 999], [250, 250, 250, 250]])
def test_the_top_is_that_of_a_full_sort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], k: int
) -> None:
    monkeypatch.setattr(score_table, "GROUP_ROWS", 64)
    scores = np.random.default_rng(0).integers(0, 40, (2, 1000)).astype(float)  # many ties
    table = filled(tmp_path / "table", sizes, scores, order=list(reversed(range(len(sizes)))))
    ids = [name_of(row) for row in range(1000)]
    for place, query in enumerate(QUERIES):
        order = order_of(ids, scores[place])[:k]
        result, best = ScoreTable(tmp_path / "table").top(query, k)
        assert result == [ids[row] for row in order]
        np.testing.assert_array_equal(best, scores[place][order])
    assert len(table) == 1000


def test_a_part_is_written_again_in_place_of_itself(tmp_path: Path) -> None:
    table = filled(tmp_path, [3, 2], np.arange(10.0).reshape(2, 5))
    table.write(0, ["x"], np.array([[100.0], [0.0]]))
    assert len(table) == 3
    assert table.top("fox", 1)[0] == ["x"]


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no queries\.json"):
        ScoreTable(tmp_path / "none")
    table = ScoreTable(tmp_path / "table", QUERIES)
    with pytest.raises(ValueError, match="scores of other queries"):
        ScoreTable(tmp_path / "table", ["fox"])
    with pytest.raises(ValueError, match=r"shape \(2, 1\), but 2 queries and 2 ids"):
        table.write(0, ["a", "b"], np.zeros((2, 1)))
    with pytest.raises(ValueError, match="Image 'b' scores nan for query 'a house'"):
        table.write(0, ["a", "b"], np.array([[0.0, 0.0], [0.0, np.nan]]))
    assert table.parts() == []
    with pytest.raises(ValueError, match="no query 'dog'"):
        table.top("dog", 1)
    with pytest.raises(ValueError, match="at least 1"):
        table.top("fox", 0)
