"""Method files: found by name, by path and by the name that they had before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wherefrom.commands.method_files import RENAMED_METHODS, available_methods, method_file


def test_every_packaged_method_has_a_line_about_it() -> None:
    methods = available_methods()
    assert {"abu", "abu_plus", "trak", "d_trak", "influence", "random"} <= set(methods)
    assert list(methods) == sorted(methods)
    for name, line in methods.items():
        assert method_file(name).read_text().startswith(f"# {line}\n"), name
        assert 10 < len(line) < 100, name
    assert len(set(methods.values())) == len(methods), "each line tells its method from the others"


def test_a_method_is_found_by_its_name_and_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "abu_plus.yaml"
    mine.write_text("class_path: Random\n")
    assert method_file(str(mine)) == method_file(mine) == mine
    assert method_file("abu_plus").name == "abu_plus.yaml"
    assert method_file("abu_plus") != mine
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("old", sorted(RENAMED_METHODS))
def test_an_old_name_is_accepted_with_one_line(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert method_file(old) == method_file(RENAMED_METHODS[old])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert repr(old) in said
    assert repr(RENAMED_METHODS[old]) in said
    old_path = method_file("abu").with_name(f"{old}.yaml")
    assert method_file(old_path).stem == RENAMED_METHODS[old]
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_method_is_refused_with_the_ones_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no method 'abu_minus'.*abu_plus,"):
        method_file("abu_minus")
    with pytest.raises(ValueError, match=r"no method file .*gone\.yaml"):
        method_file(tmp_path / "gone.yaml")


def test_listing_methods_does_not_load_pytorch() -> None:
    code = "import sys; from wherefrom.commands.method_files import available_methods; available_methods(); "
    code += "print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"
