"""The wheel alone: installed beside its dependencies, used from an empty folder, with no checkout in reach."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.support.user_world import SET, UserWorld
from wherefrom.rankings.ranking_file import read_ranking

ROOT = Path(__file__).parents[2]
SOURCES = ("wherefrom", "pyproject.toml", "README.md", "LICENSE")


def run(words: list[str], where: Path) -> subprocess.CompletedProcess[str]:
    outside = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(words, cwd=where, env=outside, capture_output=True, text=True, check=False)


def test_the_wheel_alone_attributes(world: UserWorld, tmp_path: Path) -> None:
    wheels, home, empty = tmp_path / "wheels", tmp_path / "venv", tmp_path / "empty"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"  # setuptools leaves build folders beside what it builds
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *SOURCES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    built = run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(wheels), str(source)], tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("wherefrom-*.whl")
    venv.create(home, with_pip=False)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    own = run([str(scripts / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path)
    packages = Path(own.stdout.strip())
    installed = run([*pip, "--python", str(scripts / "python"), "install", "--no-deps", "-q", str(wheel)], tmp_path)
    assert installed.returncode == 0, installed.stderr
    # A folder named here is searched, but its own .pth files, such as an editable installation's, are not read.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    empty.mkdir()
    where = run([str(scripts / "python"), "-c", "import wherefrom; print(wherefrom.__file__)"], empty)
    assert Path(where.stdout.strip()).is_relative_to(packages), where.stdout + where.stderr

    command = str(scripts / "wherefrom")
    listed = run([command, "methods"], empty)
    assert listed.returncode == 0, listed.stderr
    assert "abu_plus " in listed.stdout
    done = run([command, "attribute", *world.words, *world.query, *SET], empty)
    assert done.returncode == 0, done.stderr[-3000:]
    (output,) = (empty / "wherefrom-runs").iterdir()
    ((ids, _),) = read_ranking(output).values()
    assert len(ids) == 16
    assert "a red square" in (output / "report.html").read_text()
    assert "Traceback" not in done.stderr
    advice = [line for line in done.stderr.splitlines() if "Expected types" in line or "Warning" in line]
    assert not advice, "libraries' advice about themselves"
