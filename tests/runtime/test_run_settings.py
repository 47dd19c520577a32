"""Settings of a run in its folder: what differs is refused line by line, before anything is done."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from wherefrom.runtime.artifacts import ArtifactMismatchError, differences, write_manifest
from wherefrom.runtime.run_settings import SETTINGS, check_settings, plain, record_settings

SAME = {"model": "a", "data": {"class_path": "Emoji", "init_args": {"size": 32}}}


@dataclass(frozen=True)
class Two:
    one: int
    other: tuple[Path, ...]


def test_settings_are_plain_json(tmp_path: Path) -> None:
    made = plain({"two": Two(3, (tmp_path, Path("not/here"))), "text": "a/b", "none": None, "share": 0.5})
    assert made == {
        "two": {"one": 3, "other": [str(tmp_path.resolve()), "not/here"]},
        "text": "a/b",
        "none": None,
        "share": 0.5,
    }
    assert json.loads(json.dumps(made)) == made


def test_a_path_is_the_same_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    assert plain("./in") == plain(str(tmp_path / "in"))


def test_another_run_is_refused_by_the_lines_that_differ(tmp_path: Path) -> None:
    methods = {"abu": {"method": "AbU", "steps": 1}}
    check_settings(tmp_path, SAME, methods)
    record_settings(tmp_path, SAME, methods)
    written = (tmp_path / SETTINGS).stat().st_mtime_ns
    check_settings(tmp_path, SAME, methods)
    record_settings(tmp_path, SAME, methods)
    assert (tmp_path / SETTINGS).stat().st_mtime_ns == written, "the same run leaves its record alone"
    other = {**SAME, "data": {"class_path": "Emoji", "init_args": {"size": 64}}}
    with pytest.raises(ArtifactMismatchError) as caught:
        check_settings(tmp_path, other, {"abu": {"method": "AbU", "steps": 2}})
    lines = str(caught.value).splitlines()
    assert lines == [
        f"{tmp_path} was made with other settings:",
        "  data.init_args.size: on disk 32, asked for 64",
        "  methods.abu.steps: on disk 1, asked for 2",
        "Choose another folder or restore the settings.",
    ]


def test_methods_may_join_and_leave_a_run(tmp_path: Path) -> None:
    record_settings(tmp_path, SAME, {"abu": {"steps": 1}})
    record_settings(tmp_path, SAME, {"trak": {"size": 2}})
    with pytest.raises(ArtifactMismatchError, match=r"methods\.abu\.steps: on disk 1, asked for 3"):
        check_settings(tmp_path, SAME, {"abu": {"steps": 3}, "pixel": {}})


def test_old_folders_are_gone_on_with_and_their_methods_compared(tmp_path: Path) -> None:
    write_manifest(tmp_path / "abu", {"attributor": {"steps": 1}, "model": "x"})
    check_settings(tmp_path, SAME, {"abu": {"steps": 1}, "trak": {"size": 2}})
    with pytest.raises(ArtifactMismatchError, match=r"attributor\.steps: on disk 1, asked for 2"):
        check_settings(tmp_path, SAME, {"abu": {"steps": 2}})


def test_lists_are_compared_place_by_place_and_long_values_shortened() -> None:
    assert differences({"a": [1, 2, 3]}, {"a": [1, 5, 3]}) == ["a.1: on disk 2, asked for 5"]
    assert differences({"a": [1]}, {"a": [1, 2]}) == ["a.1: on disk None, asked for 2"]
    many = differences({"a": list(range(20))}, {"a": list(range(1, 21))})
    assert len(many) == 6
    assert many[-1] == "a: and 15 more"
    (line,) = differences({"a": "x" * 500}, {"a": "y"})
    assert len(line) < 120
