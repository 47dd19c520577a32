"""Rankings: order, ties, and the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wherefrom.rankings.ranking_file import (
    RANKING,
    flatness_of,
    normalised_ranks,
    order_of,
    read_ranking,
    write_ranking,
)

IDS = ("b", "a", "d", "c")


def test_order_is_by_score_and_then_by_id() -> None:
    assert order_of(IDS, np.array([1.0, 1.0, 3.0, -2.0])).tolist() == [2, 1, 0, 3]
    assert order_of(IDS, np.zeros(4)).tolist() == [1, 0, 3, 2]
    assert order_of((), np.empty(0)).tolist() == []


def test_order_does_not_depend_on_the_order_of_the_images() -> None:
    random = np.random.default_rng(0)
    ids, scores = [f"picture/{index}" for index in range(50)], random.integers(0, 8, 50).astype(float)
    expected = [ids[index] for index in order_of(ids, scores)]
    shuffled = random.permutation(50)
    again = [ids[index] for index in shuffled]
    assert [again[index] for index in order_of(again, scores[shuffled])] == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_names_the_image(bad: float) -> None:
    with pytest.raises(ValueError, match=f"The score of image 'd' is {bad}; rankings need finite scores"):
        order_of(IDS, np.array([1.0, 2.0, bad, 0.0]))


def test_normalised_ranks_start_at_zero() -> None:
    assert normalised_ranks(IDS, np.array([1.0, 1.0, 3.0, -2.0])).tolist() == [0.5, 0.25, 0.0, 0.75]


RANKINGS = {
    "second": (IDS, np.array([0.5, 1.5, -0.5, 0.1 + 0.2])),
    "first": (("x", "y"), np.array([1.0, 2.0])),
}


def test_the_file_is_sorted_by_query_and_rank(tmp_path: Path) -> None:
    write_ranking(tmp_path, RANKINGS)
    table = pq.read_table(tmp_path / RANKING)
    assert table.schema.equals(
        pa.schema([("query", pa.string()), ("rank", pa.int64()), ("image", pa.string()), ("score", pa.float64())])
    )
    assert table.to_pylist() == [
        {"query": "first", "rank": 1, "image": "y", "score": 2.0},
        {"query": "first", "rank": 2, "image": "x", "score": 1.0},
        {"query": "second", "rank": 1, "image": "a", "score": 1.5},
        {"query": "second", "rank": 2, "image": "b", "score": 0.5},
        {"query": "second", "rank": 3, "image": "c", "score": 0.1 + 0.2},
        {"query": "second", "rank": 4, "image": "d", "score": -0.5},
    ]


def test_p_values_go_with_their_images(tmp_path: Path) -> None:
    write_ranking(tmp_path, RANKINGS, {"first": np.array([0.1, 0.2]), "second": np.array([0.3, 0.4, 0.5, 0.6])})
    table = pq.read_table(tmp_path / RANKING).to_pydict()
    assert dict(zip(table["image"], table["p_value"], strict=True)) == {
        "x": 0.1,
        "y": 0.2,
        "b": 0.3,
        "a": 0.4,
        "d": 0.5,
        "c": 0.6,
    }


def test_a_ranking_comes_back(tmp_path: Path) -> None:
    write_ranking(tmp_path, RANKINGS)
    result = read_ranking(tmp_path)
    assert list(result) == ["first", "second"]
    assert result["second"][0] == ["a", "b", "c", "d"]
    assert result["second"][1].tolist() == [1.5, 0.5, 0.1 + 0.2, -0.5]


def test_a_bad_score_leaves_the_former_file(tmp_path: Path) -> None:
    write_ranking(tmp_path, RANKINGS)
    before = (tmp_path / RANKING).read_bytes()
    with pytest.raises(ValueError, match="image 'x'"):
        write_ranking(tmp_path, {"first": (("x",), np.array([float("nan")]))})
    assert (tmp_path / RANKING).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [RANKING]


def test_flatness_is_the_effective_share_of_those_above_the_median() -> None:
    random = np.random.default_rng(0)
    assert flatness_of(random.uniform(size=200_000)) == pytest.approx(3 / 4, abs=0.01)
    assert flatness_of(5 + 2 * random.normal(size=200_000)) == pytest.approx(2 / np.pi, abs=0.01)
    assert flatness_of(np.array([0.0, 0.0, 0.0, 7.0])) == 1.0  # the one that has any has it all
    assert flatness_of(np.array([0.0, 0.0, 0.0, 1.0, 3.0])) == pytest.approx(16 / (2 * 10))
    assert flatness_of(np.zeros(4)) == 1.0
