"""Fixtures that the tests of data sets share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wherefrom.data.emoji import build_emoji
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder
from wherefrom.data.image_set import ImageSet
from wherefrom.runtime.artifacts import Store


@pytest.fixture(scope="session")
def emoji_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that holds the default emoji world, drawn once for all tests."""
    store = Store(tmp_path_factory.mktemp("emoji"))
    build_emoji(store)
    return store


@pytest.fixture(scope="session")
def emoji_images(emoji_store: Store) -> ImageSet:
    """The default emoji world."""
    return build_emoji(emoji_store)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "folder"


@pytest.fixture
def build(tmp_path: Path, folder: Path) -> Callable[..., ImageSet]:
    def build(**options: Any) -> ImageSet:
        return build_image_folder(Store(tmp_path / "store"), folder, ImageFolderOptions(**options))

    return build
