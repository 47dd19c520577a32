"""The API reference has a page for every public module, with what the docstrings say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_module_has_a_page(tmp_path: Path) -> None:
    command = [sys.executable, "docs/reference.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Warn" not in done.stderr, done.stderr
    packages = ("wherefrom", "callbacks", "datamodules", "lightning_modules")
    sources = [path for package in packages for path in (ROOT / package).rglob("*.py") if not path.name.startswith("_")]
    missing = [path for path in sources if not (tmp_path / path.relative_to(ROOT)).with_suffix(".html").exists()]
    assert not missing
    page = (tmp_path / "wherefrom" / "diffusion.html").read_text()
    assert "DiffusionModel" in page
    assert "the mean over latent elements of (target - output)²" in page, "docstrings are there"
