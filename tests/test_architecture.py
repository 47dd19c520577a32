"""The floors of the house hold: what may import what, how large a file is, and how long arguments are given."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package of `wherefrom` imports only packages named before it (docs/architecture.md).
FLOORS = (
    "runtime",
    "metrics",
    "rankings",
    "models",
    "training",
    "data",
    "features",
    "queries",
    "gradients",
    "curvature",
    "distillation",
    "index",
    "attributors",
    "reports",
    "commands",
    "counterfactual",
    "evidence",
    "interchange",
    "api",
    "serving",
    "cli",
)
LIGHTNING_FOLDERS = ("lightning_modules", "datamodules", "callbacks")
LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")
# Folders whose files may import Lightning and the root scripts: they reproduce tables, measure and test.
WORKSHOPS = ("experiments", "benchmarks", "tests")
SAME_NAME = ("__init__.py", "__main__.py", "attributor.py", "base.py")
# Signatures that are not ours to choose: hooks of other libraries, and the call of the release before.
GIVEN = {("RetrievalMetrics", "on_validation_batch_end"), ("DiffusionLoss", "get_output"), ("", "attribute_pictures")}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Dotted names of all modules and names that a file imports, lazily or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{package}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(dotted: str) -> str | None:
    """The package of `wherefrom` that a dotted name is in; None for the public names at its top."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "wherefrom" and len(parts) > 1 and parts[1] in FLOORS else None


def climbs(path: str, text: str) -> list[str]:
    """Imports of a file of `wherefrom` that go up, or to a package without a floor."""
    here = Path(path).parts[1].removesuffix(".py")
    if here == "__init__":  # the public names, each imported when it is first asked for
        return []
    assert here in FLOORS, f"{path}: {here} is no floor"
    found = []
    for name in imported(ast.parse(text), path):
        there = floor_of(name)
        if name.startswith("wherefrom.") and there is not None and FLOORS.index(there) > FLOORS.index(here):
            found.append(f"{path} imports {name}")
    return found


def test_no_import_of_the_library_goes_up() -> None:
    files = sources("wherefrom")
    assert len(files) > 100
    assert [line for path in files for line in climbs(str(path.relative_to(ROOT)), path.read_text())] == []


def test_an_import_that_is_turned_round_is_seen() -> None:
    assert climbs("wherefrom/runtime/artifacts.py", "from wherefrom.models.diffusion import DiffusionModel")
    assert climbs("wherefrom/gradients/projection.py", "def f():\n    import wherefrom.attributors.base")
    assert not climbs("wherefrom/attributors/base.py", "from wherefrom.gradients import projection")


def test_every_package_has_a_floor() -> None:
    packages = {path.name for path in (ROOT / "wherefrom").iterdir() if (path / "__init__.py").exists()}
    assert packages <= set(FLOORS)
    assert len(packages) <= 20
    assert len(set(FLOORS)) == len(FLOORS)


def test_the_library_knows_neither_lightning_nor_the_folders_around_it() -> None:
    around = (*LIGHTNING_FOLDERS, *WORKSHOPS, "train", "evaluate", *LIGHTNING)
    for path in sources("wherefrom"):
        roots = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
        assert not roots & set(around), path


def test_only_the_root_scripts_and_workshops_import_the_root_scripts() -> None:
    for path in sources(*LIGHTNING_FOLDERS):
        roots = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
        assert not roots & {"train", "evaluate", *WORKSHOPS}, path
    assert "evaluate" not in {name.split(".")[0] for name in imported(ast.parse((ROOT / "train.py").read_text()))}


def test_no_file_name_occurs_twice_in_the_library() -> None:
    names = Counter(path.name for path in sources("wherefrom") if path.name not in SAME_NAME)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    ("folders", "most"), [(("wherefrom", "experiments", "benchmarks"), 400), (LIGHTNING_FOLDERS, 200)]
)
def test_files_stay_small(folders: tuple[str, ...], most: int) -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(*folders)}
    assert {path: length for path, length in lengths.items() if length > most} == {}


def by_position(text: str) -> list[str]:
    """Functions of more than five parameters that take more than the first of them by position."""
    found = []
    for parent in ast.walk(ast.parse(text)):
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            owner = parent.name if isinstance(parent, ast.ClassDef) else ""
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
            if owner and names[:1] in (["self"], ["cls"]):
                names = names[1:]
            many = len(names) + len(node.args.kwonlyargs) > 5
            if many and len(names) > 1 and (owner, node.name) not in GIVEN:
                found.append(f"{owner}.{node.name}".lstrip("."))
    return found


def test_many_parameters_are_given_by_keyword() -> None:
    folders = ("wherefrom", "experiments", "benchmarks", *LIGHTNING_FOLDERS)
    files = [*sources(*folders), ROOT / "train.py", ROOT / "evaluate.py"]
    listed = {str(path.relative_to(ROOT)): by_position(path.read_text()) for path in files}
    assert {path: names for path, names in listed.items() if names} == {}
    assert by_position("def f(a, b, c, d, e, f): ...") == ["f"]
