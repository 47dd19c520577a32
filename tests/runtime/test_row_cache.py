"""Rows by image: the same however the work is cut, never done twice, and on disk only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.runners import Together
from tests.support.tiny import one_process
from wherefrom.runtime.artifacts import ArtifactMismatchError, Store
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.row_cache import IDS, VALUES, Rows, make_rows, read_rows

IDENTITY = {"of": "squares"}
NAMES = tuple(f"picture/{index}" for index in range(10))


def squares(asked: list[range], broken: int | None = None) -> Callable[[range], Tensor]:
    def compute(positions: range) -> Tensor:
        if broken in positions:
            raise RuntimeError("interrupted")
        asked.append(positions)
        return torch.tensor([[[p, p * p]] for p in positions], dtype=torch.float64)

    return compute


def make(root: Path, compute: Callable[[range], Tensor], chunk_size: int = 4, runner: Runner | None = None) -> Rows:
    return make_rows(
        compute,
        ids=NAMES,
        store=Store(root),
        kind="squares",
        identity=IDENTITY,
        runner=runner or one_process(),
        chunk_size=chunk_size,
    )


EXPECTED = torch.tensor([[[p, p * p]] for p in range(10)], dtype=torch.float64)


def test_rows_are_kept_by_id_and_memory_mapped(tmp_path: Path) -> None:
    asked: list[range] = []
    rows = make(tmp_path, squares(asked))
    assert asked == [range(0, 4), range(4, 8), range(8, 10)]
    assert rows.ids == NAMES
    torch.testing.assert_close(rows.values, EXPECTED, rtol=0, atol=0)
    folder = Store(tmp_path).path("squares", IDENTITY)
    assert {path.name for path in folder.iterdir()} == {VALUES, IDS, "manifest.json"}
    again = make(tmp_path, squares(asked), chunk_size=3)
    assert len(asked) == 3, "what is whole is not computed again"
    np.load(folder / VALUES, mmap_mode="r+")[2] = 5.0
    assert again.values[2].tolist() == [[5.0, 5.0]], "the rows are read from the file when they are used"
    again.values[3] = 7.0
    assert read_rows(folder).values[3].tolist() == [[3.0, 9.0]], "and never written to it"


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first: list[range] = []
    with pytest.raises(RuntimeError, match="interrupted"):
        make(tmp_path, squares(first, broken=9))
    assert first == [range(0, 4), range(4, 8)]
    second: list[range] = []
    rows = make(tmp_path, squares(second))
    assert second == [range(8, 10)]
    torch.testing.assert_close(rows.values, EXPECTED, rtol=0, atol=0)


def test_an_interruption_after_joining_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise RuntimeError("interrupted")

    with monkeypatch.context() as broken:
        broken.setattr("wherefrom.runtime.artifacts.write_manifest", interrupted)
        with pytest.raises(RuntimeError, match="interrupted"):
            make(tmp_path, squares([]))
    asked: list[range] = []
    torch.testing.assert_close(make(tmp_path, squares(asked)).values, EXPECTED, rtol=0, atol=0)
    assert asked == []


def test_processes_share_the_chunks_that_are_left(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        make(tmp_path, squares([], broken=3), chunk_size=3)
    meeting, summands = threading.Barrier(2), list[Tensor]()
    asked: list[list[range]] = [[], []]
    result: list[Rows | None] = [None, None]

    def work(rank: int) -> None:
        runner = Together(torch.device("cpu"), rank, 2, meeting, summands)
        result[rank] = make(tmp_path, squares(asked[rank]), 3, runner)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [[range(3, 6), range(9, 10)], [range(6, 9)]]
    for rows in result:
        assert rows is not None
        torch.testing.assert_close(rows.values, EXPECTED, rtol=0, atol=0)


def test_chunks_of_another_size_are_not_mixed_in(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        make(tmp_path, squares([], broken=9))
    rows = make(tmp_path, squares([]), chunk_size=3)
    torch.testing.assert_close(rows.values, EXPECTED, rtol=0, atol=0)
    assert not list(Store(tmp_path).path("squares", IDENTITY).glob("chunk-*"))


def test_rows_of_other_images_are_refused(tmp_path: Path) -> None:
    make(tmp_path, squares([]))
    with pytest.raises(ArtifactMismatchError, match="holds rows of 10 other images than the 2 asked for"):
        make_rows(
            squares([]), ids=["a", "b"], store=Store(tmp_path), kind="squares", identity=IDENTITY, runner=one_process()
        )
