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
