"""Arrays that grow on disk and go on after an interruption; views of some of their rows."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.processes import exit_status_of
from wherefrom.runtime import mapped_arrays
from wherefrom.runtime.mapped_arrays import GrowingArray, JoinedRows, RowView, join_rows, map_array, take_rows

NUMBERS = np.random.default_rng(0).normal(size=(23, 2, 3)).astype(np.float32)


def grow(path: Path, stop: int, blocks: int = 5) -> int:
    """Adds rows up to `stop` and says where it began."""
    with GrowingArray(path, (2, 3), np.float32) as array:
        start = array.rows
        while array.rows < stop:
            array.append(NUMBERS[array.rows : min(array.rows + blocks, stop)], seen=array.rows)
        if stop == len(NUMBERS):
            array.finish()
    return start


@pytest.mark.parametrize("junk", [0, 1, 23, 24, 100])
def test_it_goes_on_from_what_was_safe(tmp_path: Path, junk: int) -> None:
    path = tmp_path / "x.npy"
    assert grow(path, 10) == 0
    assert not path.exists()
    (growing,) = tmp_path.glob("*.growing")
    with growing.open("ab") as stream:
        stream.write(b"\xff" * junk)  # the beginning of a block that was never finished
    with GrowingArray(path, (2, 3), np.float32) as array:
        assert array.note == {"seen": 5}
    assert grow(path, 23, blocks=3) == 10
    np.testing.assert_array_equal(np.load(path), NUMBERS)
    assert [file.name for file in tmp_path.iterdir()] == ["x.npy"]
    with GrowingArray(path, (2, 3), np.float32) as array:
        assert array.finished


def test_any_blocks_make_the_same_bytes(tmp_path: Path) -> None:
    whole = set()
    for blocks in (1, 4, 23, 50):
        grow(tmp_path / f"{blocks}.npy", 23, blocks)
        whole.add((tmp_path / f"{blocks}.npy").read_bytes())
    assert len(whole) == 1


def grow_until_killed(path: Path) -> None:
    """Leaves three blocks and the beginning of a fourth, and is killed."""
    with GrowingArray(path, (2, 3), np.float32) as array:
        for start in range(0, 12, 4):
            array.append(NUMBERS[start : start + 4])
        array._stream.write(NUMBERS[12:15].tobytes()[:-5])
        array._stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_its_finished_blocks(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    assert exit_status_of(grow_until_killed, path) == -signal.SIGKILL
    assert grow(path, 23) == 12
    np.testing.assert_array_equal(np.load(path), NUMBERS)


ROWS = np.array([5, 2, 22, 2], dtype=np.intp)


@pytest.mark.parametrize(
    "key",
    [
        1,
        slice(1, 3),
        (slice(None, 2), 0),
        (slice(1, None), [0, 0, 1]),
        [3, 0],
        ([3, 0], [1, 0]),
        ([0, 1], 1, [2, 0]),
    ],
    ids=str,
)
def test_a_view_is_indexed_as_a_copy(key: object) -> None:
    copy, tensor = NUMBERS[ROWS], torch.from_numpy(NUMBERS)
    np.testing.assert_array_equal(RowView(NUMBERS, ROWS)[key], copy[key])
    assert torch.equal(RowView(tensor, ROWS)[key], torch.from_numpy(copy)[key])
    if isinstance(key, list):
        assert torch.equal(RowView(tensor, ROWS)[torch.tensor(key)], torch.from_numpy(copy)[key])


def test_whole_rows_stay_a_view() -> None:
    view = RowView(NUMBERS, ROWS)[:, :1]
    assert isinstance(view, RowView)
    np.testing.assert_array_equal(np.asarray(view), NUMBERS[ROWS][:, :1])
    assert (view.shape, view.nbytes, len(view), view.dtype) == ((4, 1, 3), 4 * 3 * 4, 4, np.float32)


def test_stretches_are_shared_and_much_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(tmp_path / "x.npy", 23)
    for array in (np.load(tmp_path / "x.npy", mmap_mode="r"), map_array(tmp_path / "x.npy")):
        assert take_rows(array, np.arange(23)) is array
        stretch = np.asarray(take_rows(array, np.arange(3, 9)))
        assert np.shares_memory(stretch, np.asarray(array))
        np.testing.assert_array_equal(stretch, NUMBERS[3:9])
        some = take_rows(array, ROWS)
        assert isinstance(some, np.ndarray | torch.Tensor), "little is copied"
        np.testing.assert_array_equal(np.asarray(some), NUMBERS[ROWS])
        assert len(take_rows(array, np.array([], dtype=np.intp))) == 0
    monkeypatch.setattr(mapped_arrays, "_LAZY_FROM", 4 * 24)
    much = take_rows(NUMBERS, ROWS)
    assert isinstance(much, RowView)
    again = take_rows(much, np.array([3, 0, 2], dtype=np.intp))
    np.testing.assert_array_equal(np.asarray(again), NUMBERS[ROWS][[3, 0, 2]])
    assert isinstance(take_rows(NUMBERS, ROWS[:3]), np.ndarray)


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_joined_rows_are_read_as_one_array(kind: str) -> None:
    both = np.random.default_rng(0).normal(size=(9, 2, 3)).astype(np.float16)
    make = torch.from_numpy if kind == "tensor" else np.asarray
    view = RowView(make(both[::-1].copy()), np.arange(8, 3, -1))  # the first five rows, from elsewhere
    joined, whole = JoinedRows(view, make(both[5:].astype(np.float32))), make(both)
    rows, other = torch.tensor([8, 0, 5, 4, 0, -1]), torch.tensor([0, 1, 1, 0, 0, 1])
    keys = [
        rows,
        rows.numpy(),
        (rows, other),
        (rows, 1),
        (rows, slice(None), 2),
        slice(2, 7),
        (slice(3, 8), 1),
        (slice(None), slice(0, 1)),
        (slice(None), 1),
        4,
        -1,
        (6, 1),
        torch.tensor([1, 2]),
        torch.tensor([], dtype=torch.long),
    ]
    for key in keys:
        result, expected = joined[key], whole[key]
        assert result.dtype == whole.dtype
        np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
    assert (len(joined), joined.shape, joined.nbytes, joined.itemsize) == (9, (9, 2, 3), both.nbytes, 2)
    np.testing.assert_array_equal(np.asarray(take_rows(joined, np.array([7, 1, 6]))), both[[7, 1, 6]])
    with pytest.raises(IndexError):
        joined[9]


def test_few_rows_are_copied_and_many_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.arange(6.0).reshape(3, 2), torch.ones(1, 2, dtype=torch.float64)
    copied = join_rows(first, second)
    assert isinstance(copied, torch.Tensor)
    assert copied.dtype == torch.float32
    monkeypatch.setattr("wherefrom.runtime.mapped_arrays._LAZY_FROM", 8)
    lazy = join_rows(first, second)
    assert isinstance(lazy, JoinedRows)
    np.testing.assert_array_equal(np.asarray(lazy), np.asarray(copied))
    np.testing.assert_array_equal(join_rows(first.numpy()[:0], second.numpy()), second.numpy())
