"""Settings that were added later change an identity only where they are changed."""

from __future__ import annotations

from dataclasses import dataclass

from wherefrom.runtime.stable_names import added_setting, settings_identity


@dataclass(frozen=True)
class _Before:
    size: int = 8


@dataclass(frozen=True)
class _After:
    size: int = 8
    pad: bool = added_setting(False)


def test_an_added_setting_enters_an_identity_only_where_it_was_changed() -> None:
    assert settings_identity(_After(4)) == settings_identity(_Before(4)) == {"size": 4}
    assert settings_identity(_After(4, True)) == {"size": 4, "pad": True}
