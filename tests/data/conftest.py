"""Fixtures that the tests of data sets share."""

from __future__ import annotations

import pytest

from wherefrom.data.emoji import build_emoji
from wherefrom.data.pictures import Pictures
from wherefrom.storage import Store


@pytest.fixture(scope="session")
def emoji_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that holds the default emoji world, drawn once for all tests."""
    store = Store(tmp_path_factory.mktemp("emoji"))
    build_emoji(store)
    return store


@pytest.fixture(scope="session")
def emoji_pictures(emoji_store: Store) -> Pictures:
    """The default emoji world."""
    return build_emoji(emoji_store)
