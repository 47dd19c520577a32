from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wherefrom.runtime.optional_dependencies import require_faiss

ROOT = Path(__file__).resolve().parents[2]


def in_empty_installation(site: Path) -> str:
    """What `require_faiss` says where `site` is the only folder of installed distributions."""
    home = "wherefrom.runtime.optional_dependencies"
    script = f"from {home} import require_faiss\ntry: print(require_faiss().WHO)\nexcept ImportError as e: print(e)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],  # -S: without the packages of this environment
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
        cwd=site,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def install(site: Path, distribution: str, source: str = "WHO = 'installed'") -> None:
    info = site / f"{distribution.replace('-', '_')}-1.15.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.15.1\n")
    (site / "faiss.py").write_text(source)


def test_returns_a_working_module() -> None:
    index = require_faiss().IndexFlatIP(3)
    index.add(np.eye(3, dtype=np.float32))
    _, nearest = index.search(np.array([[0.0, 0.2, 0.9]], dtype=np.float32), 2)
    assert nearest.tolist() == [[2, 1]]


@pytest.mark.parametrize("distribution", ["faiss-cpu", "faiss-gpu"])
def test_either_extra_is_enough(tmp_path: Path, distribution: str) -> None:
    install(tmp_path, distribution)
    assert in_empty_installation(tmp_path) == "installed"


def test_neither_extra_names_both(tmp_path: Path) -> None:
    said = in_empty_installation(tmp_path)
    assert "not installed" in said
    assert "exactly one" in said
    assert "pip install 'wherefrom[cpu]'" in said
    assert "pip install 'wherefrom[gpu]'" in said


@pytest.mark.parametrize("other", ["faiss-gpu", "faiss-gpu-cu12"])
def test_both_extras_are_refused(tmp_path: Path, other: str) -> None:
    install(tmp_path, "faiss-cpu")
    install(tmp_path, other)
    said = in_empty_installation(tmp_path)
    assert f"faiss-cpu and {other} are installed together" in said
    assert f"pip uninstall faiss-cpu {other}" in said


def test_a_broken_faiss_is_not_called_missing(tmp_path: Path) -> None:
    install(tmp_path, "faiss-gpu", "import library_of_the_driver")
    assert in_empty_installation(tmp_path) == "No module named 'library_of_the_driver'"
