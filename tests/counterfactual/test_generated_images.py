"""Folders of a run by the names that an earlier release gave them."""

from __future__ import annotations

from pathlib import Path

from wherefrom.counterfactual.generated_images import images_folder
from wherefrom.counterfactual.reattribution import reattribution_folder


def test_folders_of_an_earlier_release_are_gone_on_with(tmp_path: Path) -> None:
    assert images_folder(tmp_path) == tmp_path / "images"
    assert reattribution_folder(tmp_path) == tmp_path / "reattribution"
    for name in ("pictures", "after"):
        (tmp_path / name).mkdir()
    assert images_folder(tmp_path) == tmp_path / "pictures"
    assert reattribution_folder(tmp_path) == tmp_path / "after"
