from pathlib import Path

import pytest

from tests.support.user_world import UserWorld, user_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> UserWorld:
    return user_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, where runs and the store go."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
