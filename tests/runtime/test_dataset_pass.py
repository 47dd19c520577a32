"""Passes over the training set: nothing is done twice and nothing is lost, whoever is interrupted, wherever."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.processes import exit_status_of, started
from tests.support.runners import Alone, Together
from wherefrom.runtime import dataset_pass
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.dataset_pass import MERGED, RANK_FILES, run_pass
from wherefrom.runtime.distributed import Runner

COUNT, CHUNK = 21, 2  # eleven chunks, the last of one image
IDENTITY = {"test": "passes"}


class Count:
    """Counts how often each image is seen, and sums numbers whose order of summation shows in the last digits.

    Args:
        log: File to which every step is written, before it is done.
        stop: First image of the chunk at which to stop.
        kill: Stop by SIGKILL instead of an exception.
    """

    def __init__(self, log: Path, stop: int | None = None, kill: bool = False) -> None:
        self.log, self.stop, self.kill = log, stop, kill
        self.seen = torch.zeros(COUNT, dtype=torch.int64)
        self.total = torch.zeros((), dtype=torch.float64)

    def step(self, positions: range) -> None:
        with self.log.open("a") as stream:
            stream.write(f"{positions.start}\n")
        if positions.start == self.stop:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        for position in positions:
            self.seen[position] += 1
            self.total += 1.0 / (1 + position)

    def merge(self, state: Mapping[str, Tensor]) -> None:
        self.seen += state["seen"]
        self.total += state["total"]

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen, "total": self.total}


CPU = torch.device("cpu")


def run(root: Path, runner: Runner, stop: int | None = None, kill: bool = False, kind: type[Count] = Count) -> Count:
    return run_pass(
        lambda: kind(root / f"steps{runner.rank}.log", stop, kill),
        count=COUNT,
        store=Store(root / "store"),
        kind="count",
        identity=IDENTITY,
        runner=runner,
        chunk_size=CHUNK,
    )


def run_together(root: Path, world_size: int) -> list[Count]:
    meeting, results, summands = threading.Barrier(world_size), [None] * world_size, []

    def work(rank: int) -> None:
        try:
            results[rank] = run(root, Together(CPU, rank, world_size, meeting, summands))
        except BaseException:
            meeting.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in results
    return [result for result in results if result is not None]


def steps(root: Path) -> list[int]:
    """First images of the chunks that were begun, over all processes."""
    return [int(line) for log in sorted(root.glob("steps*.log")) for line in log.read_text().split()]


def assert_whole(result: Count) -> None:
    assert result.seen.tolist() == [1] * COUNT
    assert float(result.total) == pytest.approx(sum(1 / (1 + position) for position in range(COUNT)), rel=1e-14)


def partial(root: Path) -> Path:
    return Store(root / "store").partial("count", IDENTITY)


@pytest.fixture(autouse=True)
def _saves_after_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_pass, "_SAVE_EVERY_S", 0.0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_every_process_gets_the_whole(tmp_path: Path, world_size: int) -> None:
    for result in run_together(tmp_path, world_size):
        assert_whole(result)
    assert sorted(steps(tmp_path)) == list(range(0, COUNT, CHUNK))
    folder = Store(tmp_path / "store").path("count", IDENTITY)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "result.safetensors"}
    assert not partial(tmp_path).exists()


def test_a_finished_pass_is_read_and_not_done_again(tmp_path: Path) -> None:
    first = run(tmp_path, Runner(CPU))
    again = run(tmp_path, Runner(CPU), stop=0)
    assert torch.equal(again.total, first.total)
    assert_whole(again)
    assert len(steps(tmp_path)) == 11


def run_until_killed(root: Path, stop: int) -> None:
    """Runs the pass, which kills its process at a chunk."""
    dataset_pass._SAVE_EVERY_S = 0.0
    run(root, Runner(CPU), stop, kill=True)


def killed(root: Path, stop: int) -> None:
    """Runs the pass in a process of its own, which kills itself at a chunk."""
    assert exit_status_of(run_until_killed, root, stop) == -signal.SIGKILL


class Slow(Count):
    """Takes a while for each chunk."""

    def step(self, positions: range) -> None:
        time.sleep(0.05)
        super().step(positions)


def run_slowly(root: Path) -> None:
    """Runs the pass, slowly enough for another run to come into its way."""
    run(root, Runner(CPU), kind=Slow)


def test_two_runs_at_once_share_one_pass(tmp_path: Path) -> None:
    runs = [started(run_slowly, tmp_path) for _ in range(2)]
    for one in runs:
        one.join()
        assert one.exitcode == 0
    assert steps(tmp_path) == list(range(0, COUNT, CHUNK))
    assert_whole(run(tmp_path, Runner(CPU), stop=0))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_pass_goes_on_where_it_was(tmp_path: Path, world_size: int) -> None:
    killed(tmp_path, stop=8)
    assert steps(tmp_path) == [0, 2, 4, 6, 8]
    for result in run_together(tmp_path, world_size):
        assert_whole(result)
    begun = steps(tmp_path)
    assert sorted(begun) == sorted([*range(0, COUNT, CHUNK), 8]), "only the chunk that was cut off is done again"


def test_a_pass_that_is_stopped_again_and_again_gets_done(tmp_path: Path) -> None:
    for stop in (0, 4, 4, 10, 20):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, Runner(CPU), stop)
    assert_whole(run(tmp_path, Runner(CPU)))
    assert sorted(steps(tmp_path)) == sorted([*range(0, COUNT, CHUNK), 0, 4, 4, 10, 20])


def test_another_number_of_processes_goes_on_with_what_several_left(tmp_path: Path) -> None:
    # Rank r of three begins with the chunks r, r + 3, …: images 0 6 12, 2 8 14 and 4 10 16.
    for rank, stop in ((0, 12), (1, 14), (2, 10)):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, Alone(CPU, rank, 3), stop)
        assert len(list(partial(tmp_path).glob(RANK_FILES))) == rank + 1
    for result in run_together(tmp_path, 2):
        assert_whole(result)
    assert sorted(steps(tmp_path)) == sorted([*range(0, COUNT, CHUNK), 10, 12, 14])


def test_a_file_that_was_merged_already_is_not_counted_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Runner(CPU), stop=8)
    (left,) = partial(tmp_path).glob(RANK_FILES)
    kept = tmp_path / "kept"
    shutil.copy(left, kept)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Runner(CPU), stop=8)
    assert (partial(tmp_path) / MERGED).exists()
    assert not list(partial(tmp_path).glob(RANK_FILES))
    # As if the process had died between writing the merged file and deleting what it holds.
    shutil.copy(kept, partial(tmp_path) / "rank00001.state.safetensors")
    assert_whole(run(tmp_path, Runner(CPU)))


def test_states_are_written_now_and_then_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_pass, "_SAVE_EVERY_S", 1e9)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Runner(CPU), stop=8)
    assert not list(partial(tmp_path).glob(RANK_FILES))
    assert_whole(run(tmp_path, Runner(CPU)))


def test_progress_counts_the_chunks_of_this_process(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Runner(CPU), stop=8)
    run_pass(
        lambda: Count(tmp_path / "steps.log"),
        count=COUNT,
        store=Store(tmp_path / "store"),
        kind="count",
        identity=IDENTITY,
        runner=Runner(CPU),
        chunk_size=CHUNK,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done, 7) for done in range(1, 8)]
