"""Rows by content: made once, whatever the order, the set or an interruption, and read as they were made."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wherefrom.runtime import mapped_arrays
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.content_rows import ContentRows, content_keys
from wherefrom.runtime.mapped_arrays import RowView


class Maker:
    """Makes rows of words and counts them."""

    def __init__(self, words: list[str], stop: int = 10**9) -> None:
        self.words, self.stop = words, stop
        self.made: list[str] = []

    def rows(self, words: list[str]) -> dict[str, Tensor]:
        random = [torch.Generator().manual_seed(sum(map(ord, word))) for word in words]
        return {
            "numbers": torch.stack([torch.randn(3, 2, generator=each, dtype=torch.float64) for each in random]),
            "short": torch.stack([torch.randn(3, generator=each) for each in random]).half(),
            "mask": torch.tensor([[len(word) > 1, len(word) > 2, True] for word in words]),
            "count": torch.tensor([len(word) for word in words]),
        }

    def make(self, positions: list[int]) -> dict[str, Tensor]:
        if len(self.made) >= self.stop:
            raise InterruptedError
        self.made += [self.words[position] for position in positions]
        return self.rows([self.words[position] for position in positions])

    def like(self) -> dict[str, Tensor]:
        return {name: each[0] for name, each in self.rows(["like"]).items()}


def fill(store: Store, words: list[str], batch: int = 2, stop: int = 10**9) -> tuple[ContentRows, Maker]:
    rows, maker = ContentRows(store, "rows", {"encoder": 1}), Maker(words, stop)
    groups = [range(start, min(start + batch, len(words))) for start in range(0, len(words), batch)]
    rows.fill(keys(words), groups, make=maker.make, like=maker.like, finished=lambda group: None)
    return rows, maker


def keys(words: list[str]) -> np.ndarray:
    return content_keys(word.encode() for word in words)


def check(rows: ContentRows, words: list[str]) -> None:
    result, expected = rows.rows(keys(words)), Maker(words).rows(words)
    assert result.keys() == expected.keys()
    for name, each in expected.items():
        assert torch.equal(result[name][torch.arange(len(words))], each)
        assert result[name].dtype == each.dtype


WORDS = ["a", "bb", "ccc", "dddd", "e"]


def test_a_row_is_made_once_and_read_as_it_was_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows, maker = fill(store, [*WORDS, "bb", "a"])
    assert maker.made == WORDS
    check(rows, WORDS)
    for again in (WORDS, WORDS[::-1], WORDS[1:3], ["e", "a", "a"]):
        rows, maker = fill(store, again)
        assert maker.made == []
        check(rows, again)


def test_a_larger_set_makes_what_is_new(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, WORDS)
    rows, maker = fill(store, ["new", *WORDS[::-1], "newer"])
    assert maker.made == ["new", "newer"]
    check(rows, ["newer", "ccc", "new", "a"])
    assert len(list(rows.folder.glob("rows-*.npy"))) == 2


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_an_interrupted_run_or_another_set_goes_on_from_what_was_safe(tmp_path: Path, stop: int) -> None:
    store = Store(tmp_path)
    with pytest.raises(InterruptedError):
        fill(store, WORDS, stop=stop)
    safe = WORDS[: -(-stop // 2) * 2]
    rows, maker = fill(store, ["other", *WORDS])
    assert maker.made == ["other", *(word for word in WORDS if word not in safe)]
    check(rows, [*WORDS, "other"])
    assert {path.suffix for path in rows.folder.iterdir()} == {".npy", ".keys", ".json"}


def test_hashes_of_rows_that_were_not_safe_do_not_count(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(InterruptedError):
        fill(store, WORDS, stop=2)
    (names,) = (tmp_path / "rows").rglob("*.keys")
    with names.open("ab") as stream:  # as if the run had died between the hashes and the rows
        stream.write(keys(["ccc", "dddd"]).tobytes())
    rows, maker = fill(store, WORDS)
    assert maker.made == WORDS[2:]
    check(rows, WORDS)


def test_two_writers_make_each_row_once(tmp_path: Path) -> None:
    made: list[str] = []

    def work() -> None:
        made.extend(fill(Store(tmp_path), WORDS)[1].made)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted(WORDS)
    check(ContentRows(Store(tmp_path), "rows", {"encoder": 1}), WORDS)


def test_rows_stand_in_the_axes_of_their_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    fill(store, WORDS)
    rows, _ = fill(store, [*WORDS, "last"])
    grid = np.array([["a", "last"], ["ccc", "a"], ["e", "bb"]])
    flat = rows.rows(keys(grid.reshape(-1).tolist()).reshape(grid.shape))["numbers"]
    assert flat.shape == (3, 2, 3, 2)
    monkeypatch.setattr(mapped_arrays, "_LAZY_FROM", 0)
    lazy = rows.rows(keys(grid.reshape(-1).tolist()).reshape(grid.shape))["numbers"]
    assert isinstance(lazy, RowView)
    assert lazy.shape == flat.shape
    assert lazy.nbytes == flat.nbytes
    images, captions = torch.tensor([2, 0, 1]), torch.tensor([1, 1, 0])
    assert torch.equal(lazy[images, captions], flat[images, captions])
    assert torch.equal(lazy[1, 0], flat[1, 0])
    assert torch.equal(lazy[images, :], flat[images])
    assert torch.equal(lazy[images, 1, 0], flat[images, 1, 0])
    assert isinstance(lazy[:, :1], RowView)
    assert torch.equal(lazy[:, :1][2, 0], flat[2, 0])
    taken = mapped_arrays.take_rows(lazy, np.array([2, 0]))
    assert torch.equal(torch.from_numpy(np.asarray(taken)), flat[[2, 0]])


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    rows, _ = fill(Store(tmp_path), WORDS)
    with pytest.raises(KeyError, match="lacks 1 of 2 rows"):
        rows.rows(keys(["a", "never"]))
