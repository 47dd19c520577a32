"""Teacher sets: what is written is read, and what is wrong is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.planted import planted_teacher
from wherefrom.distillation.teacher_set import (
    FEATURES,
    QUERIES,
    TRAINING,
    Features,
    TeacherSet,
    read_teacher_set,
    write_teacher_set,
)

TEACHER = planted_teacher(queries=4, images=9, scored=3)


def assert_same(result: TeacherSet, expected: TeacherSet) -> None:
    for name in ("images", "captions", "queries", "prompts", "identity"):
        assert getattr(result, name) == getattr(expected, name)
    assert np.array_equal(result.rows, expected.rows)
    assert np.array_equal(result.scores, expected.scores)
    assert result.features.keys() == expected.features.keys()
    for name, both in expected.features.items():
        assert np.array_equal(result.features[name].training, both.training)
        assert np.array_equal(result.features[name].queries, both.queries)


@pytest.mark.parametrize("scored", [1, 3, None])
def test_a_set_is_read_as_it_was_written(tmp_path: Path, scored: int | None) -> None:
    teacher = planted_teacher(queries=4, images=9, scored=scored)
    write_teacher_set(tmp_path, teacher)
    result = read_teacher_set(tmp_path)
    assert_same(result, teacher)
    assert (result.rows.dtype, result.scores.dtype) == (np.int32, np.float32)
    assert result.is_complete == (scored is None)
    assert isinstance(result.features["first"].training, np.memmap)


def test_the_files_are_those_that_are_documented(tmp_path: Path) -> None:
    write_teacher_set(tmp_path, TEACHER)
    table = pq.read_table(tmp_path / QUERIES).to_pylist()
    assert [row["query"] for row in table] == list(TEACHER.queries)
    assert table[2]["images"] == TEACHER.rows[2].tolist()
    assert table[2]["scores"] == TEACHER.scores[2].tolist()
    assert pq.read_table(tmp_path / TRAINING).to_pylist()[3] == {"image": "picture/0003", "caption": "caption 3"}
    features = np.load(tmp_path / FEATURES / "second.queries.npy", allow_pickle=False)
    assert np.array_equal(features, TEACHER.features["second"].queries)
    assert features.dtype == np.float32


def test_only_the_features_that_are_asked_for_are_read(tmp_path: Path) -> None:
    write_teacher_set(tmp_path, TEACHER)
    (tmp_path / FEATURES / "first.training.npy").unlink()
    assert list(read_teacher_set(tmp_path, ["second"]).features) == ["second"]
    assert read_teacher_set(tmp_path, []).features == {}
    with pytest.raises(ValueError, match="has no features 'third'; it has first, second"):
        read_teacher_set(tmp_path, ["second", "third"])


def test_a_table_in_several_parts_is_read(tmp_path: Path) -> None:
    write_teacher_set(tmp_path, TEACHER)
    table = pq.read_table(tmp_path / QUERIES)
    pq.write_table(table, tmp_path / QUERIES, row_group_size=2)
    assert_same(read_teacher_set(tmp_path), TEACHER)


def test_some_queries_keep_what_is_theirs() -> None:
    part = TEACHER.of_queries([3, 1])
    assert part.queries == (TEACHER.queries[3], TEACHER.queries[1])
    assert part.prompts == (TEACHER.prompts[3], TEACHER.prompts[1])
    assert np.array_equal(part.rows, TEACHER.rows[[3, 1]])
    assert np.array_equal(part.scores, TEACHER.scores[[3, 1]])
    for name, both in TEACHER.features.items():
        assert np.array_equal(part.features[name].queries, both.queries[[3, 1]])
        assert part.features[name].training is both.training
    assert part.images == TEACHER.images


def test_features_stand_side_by_side_in_the_order_asked_for() -> None:
    first, second = TEACHER.features["first"], TEACHER.features["second"]
    both = TEACHER.concatenated(["second", "first"])
    assert np.array_equal(both.training, np.concatenate([second.training, first.training], axis=1))
    assert np.array_equal(both.queries, np.concatenate([second.queries, first.queries], axis=1))
    assert TEACHER.concatenated(["first"]) is first
    with pytest.raises(ValueError, match="no features 'third'; it has first, second"):
        TEACHER.concatenated(["first", "third"])
    with pytest.raises(ValueError, match=r"no features '\(none named\)'"):
        TEACHER.concatenated([])


def changed(name: str, index: tuple[int, ...], value: float) -> np.ndarray:
    array = getattr(TEACHER, name).copy()
    array[index] = value
    return array


def features_with(side: str, value: np.ndarray) -> dict[str, Features]:
    return {"first": replace(TEACHER.features["first"], **{side: value})}


FIRST = TEACHER.features["first"]
HOLES = FIRST.training.copy()
HOLES[5, 1] = np.nan
REPEATED = TEACHER.images[TEACHER.rows[1, 0]]
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"images": ("picture/0001", *TEACHER.images[1:])}, "ids of the training images are not unique: 'picture/0001'"),
    ({"queries": ("a", "b", "c", "b")}, "ids of the queries are not unique: 'b'"),
    ({"captions": ("one",)}, "9 training images have 1 captions, and 4 queries 4 prompts"),
    ({"prompts": ()}, "9 training images have 9 captions, and 4 queries 0 prompts"),
    ({"rows": TEACHER.rows[:, :2]}, r"Rows \(4, 2\) and scores \(4, 3\) must be"),
    ({"rows": TEACHER.rows[:3], "scores": TEACHER.scores[:3]}, r"Rows \(3, 3\) and scores \(3, 3\) must be"),
    ({"rows": TEACHER.rows[:, :0], "scores": TEACHER.scores[:, :0]}, "No image was scored for any query"),
    ({"rows": changed("rows", (2, 1), 9)}, "Query 'query/002' ranks image 9 of a training set of 9"),
    ({"rows": changed("rows", (2, 1), -1)}, "Query 'query/002' ranks image -1 of"),
    ({"rows": changed("rows", (1, 2), TEACHER.rows[1, 0])}, f"Query 'query/001' ranks '{REPEATED}' twice"),
    ({"scores": changed("scores", (3, 1), np.inf)}, "Query 'query/003': the score of 'picture/.*' is inf"),
    ({"features": features_with("training", FIRST.training[:8])}, r"'first' of training have shape \(8, 4\); 9 rows"),
    ({"features": features_with("queries", FIRST.queries[:, 0])}, r"'first' of queries have shape \(4,\); 4 rows"),
    ({"features": features_with("queries", FIRST.queries[:, :3])}, "'first' have 4 numbers .* and 3 for queries"),
    ({"features": features_with("training", HOLES)}, "Row 5 of the features 'first' of training holds a number"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TEACHER, **change)


def test_a_folder_without_a_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json"):
        read_teacher_set(tmp_path)


@pytest.mark.parametrize("name", [TRAINING, QUERIES])
def test_a_damaged_table_is_refused(tmp_path: Path, name: str) -> None:
    write_teacher_set(tmp_path, TEACHER)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{name} is not a table that can be read"):
        read_teacher_set(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is not a table that can be read"):
        read_teacher_set(tmp_path)
    pq.write_table(pa.table({"image": ["a"], "query": ["b"]}), tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} has no column '(caption|prompt)'; it has image, query"):
        read_teacher_set(tmp_path)


def test_queries_with_fewer_scored_images_are_refused(tmp_path: Path) -> None:
    write_teacher_set(tmp_path, TEACHER)
    rows = pq.read_table(tmp_path / QUERIES).to_pylist()
    rows[1]["images"] = rows[1]["images"][:2]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / QUERIES)
    with pytest.raises(ValueError, match="cannot be used: the queries have between 2 and 3 scored images"):
        read_teacher_set(tmp_path)


def test_a_set_whose_parts_do_not_fit_names_the_folder(tmp_path: Path) -> None:
    write_teacher_set(tmp_path, TEACHER)
    np.save(tmp_path / FEATURES / "first.queries.npy", np.zeros((5, 4), np.float32))
    with pytest.raises(ValueError, match=rf"The teacher set {tmp_path} cannot be used: Features 'first' of queries"):
        read_teacher_set(tmp_path)


def test_pickled_features_are_refused(tmp_path: Path) -> None:
    write_teacher_set(tmp_path, TEACHER)
    np.save(tmp_path / FEATURES / "first.queries.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be used"):
        read_teacher_set(tmp_path)


@pytest.mark.parametrize("name", ["first.training.npy", "second.queries.npy"])
def test_damaged_features_are_refused(tmp_path: Path, name: str) -> None:
    write_teacher_set(tmp_path, TEACHER)
    path = tmp_path / FEATURES / name
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be used"):
        read_teacher_set(tmp_path)
