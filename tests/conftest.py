import logging
import os

# One thread, here and in every process that a test starts: the same sums on every machine, and for tiny models more
# threads are only slower. Set before torch is imported, which reads it.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing downloads or reports in tests; set before any test module imports the libraries that read these.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import signal
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # also where a plugin imported torch first

# The files that take longest: begun first, or one process would work on the last of them while the other is idle.
LONGEST = ("test_experiments.py", "test_acceleration.py", "test_evaluate.py", "test_curate.py", "test_distributed.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; `make test` keeps that order."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))  # stable: the others keep their order


@pytest.fixture(autouse=True, scope="module")
def root_log_level() -> Iterator[None]:
    """Gives the root logger its level back: kronfluence raises it, and warnings would be lost in later modules."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of two workers on this machine."""
    import ray

    def give_up(*_: object) -> None:
        raise TimeoutError("Ray did not come to an end.")

    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: a busy machine would keep the workers from starting
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(300)
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
    yield
    ray.shutdown()
    signal.alarm(0)
