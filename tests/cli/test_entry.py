"""The command itself: help that loads nothing, wrong words, mistakes in one line, systems other than Unix."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from wherefrom import api
from wherefrom.attributors.unlearning.step_size import alpha_for_increase
from wherefrom.cli.entry import COMMANDS, WORDS, parser
from wherefrom.runtime.cli_errors import in_words_of, option_names

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "lightning", "transformers", "diffusers", "wandb", "jsonargparse", "numpy", "matplotlib", "pyarrow")
LOADED = f"""
import sys
from wherefrom.cli import main
try:
    main()
finally:
    print("LOADED", sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
"""
# The laboratory's libraries: importing them now fails.
WITHOUT = """
import sys
for name in "lightning pytorch_lightning wandb".split():
    sys.modules[name] = None
"""


def command(*words: str, code: str = "from wherefrom.cli import main; main()") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "words", [["--help"], ["attribute", "--help"], ["compare", "--help"], ["budget", "--help"], ["report", "--help"]]
)
def test_help_loads_nothing_that_takes_long(words: list[str]) -> None:
    done = command(*words, code=LOADED)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stderr
    assert "Args:" not in done.stdout, "internal docstrings"
    examples = [line for line in done.stdout.splitlines() if line.startswith("  wherefrom ")]
    assert examples, "a runnable example stands on a line of its own"


def test_help_names_every_command_on_a_line() -> None:
    lines = command("--help").stdout.splitlines()
    for name, (_, about) in COMMANDS.items():
        assert f"  {name:<10} {about}" in lines


def test_the_version_is_the_packages() -> None:
    import wherefrom

    assert command("--version").stdout == f"wherefrom {wherefrom.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "usage: wherefrom COMMAND"),
        (["atribute"], "invalid choice: 'atribute'"),
        (["attribute", "--modle", "m"], "unrecognized arguments: --modle m"),
        (["attribute", "--seed", "one"], "argument --seed: invalid int value: 'one'"),
        (["attribute", "--prompt", " "], "an image cannot be drawn from an empty prompt"),
        (["index", "forget", "x"], "invalid choice: 'forget'"),
    ],
)
def test_wrong_words_end_with_status_2(words: list[str], said: str) -> None:
    done = command(*words)
    assert done.returncode == 2
    assert said in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["attribute"], "--model is missing: give it, or model in a -c file."),
        (["attribute", "--model", "m"], "--images is missing: give it, or images in a -c file."),
        (["attribute", "--model", "m", "--images", "i"], "--query is missing:"),
        (["attribute", "--model", "m", "--images", "i", "--query", "q.png"], "--query: there is no image file 'q.png'"),
        (["attribute", "-c", "run.yaml"], "-c: there is no file 'run.yaml'"),
        (["budget", "lds"], "budget stands before attribute or compare with all its words; given 'lds'."),
        (["report", "nowhere"], "nowhere is not a folder"),
        (["index", "removed", "nowhere"], "nowhere holds no manifest.json"),
        (["convert", "pickle", "nothing.pkl", "a.npy"], "nothing.pkl"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(words: list[str], said: str) -> None:
    done = command(*words)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line != "loading PyTorch"]
    assert line.startswith("error: ")
    assert said in line


def test_nothing_is_imported_or_called_that_only_unix_has() -> None:
    modules = {"resource", "fcntl", "termios", "pwd", "grp", "pty", "tty"}
    calls = {"fork", "forkpty", "getuid", "geteuid", "getgid", "sched_getaffinity", "SIGALRM", "SIGKILL", "alarm"}
    for path in (ROOT / "wherefrom").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in tree.body:  # inside a function it may stand behind a check of the system
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not modules & set(names), path
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not calls & used, path


def test_everything_works_without_the_laboratorys_libraries() -> None:
    code = (
        WITHOUT
        + """
import importlib, pkgutil
import wherefrom.api, wherefrom.cli
for module in pkgutil.iter_modules(wherefrom.cli.__path__, "wherefrom.cli."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
sys.platform = "win32"
import psutil
class Memory: peak_wset = 5
psutil.Process = lambda: type("P", (), {"memory_info": staticmethod(lambda: Memory)})
from wherefrom.runtime.console import peak_memory
print(peak_memory())
"""
    )
    done = command(code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "5\n"


@pytest.mark.parametrize("name", ["index", "interchange"])
def test_the_earlier_names_say_the_new_words_in_one_line(name: str, tmp_path: Path) -> None:
    new = {"index": "index", "interchange": "convert"}[name]
    done = subprocess.run(
        [sys.executable, "-m", f"wherefrom.{name}", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == f"python -m wherefrom.{name} is now: wherefrom {new}\n"
    assert done.stdout == command(new, "--help").stdout


def test_options_are_named_as_the_interface_names_them() -> None:
    words = {"queries.resize": "--resize", "queries": "--query"}
    assert in_words_of("set queries.resize of queries", words) == "set --resize of --query"
    with pytest.raises(ValueError, match=r"^no --query$") as raised, option_names(words):
        raise ValueError("no queries")
    assert str(raised.value.__cause__) == "no queries"
    same = ValueError("nothing to rename")
    with pytest.raises(ValueError, match="nothing") as kept, option_names(words):
        raise same
    assert kept.value is same


@pytest.mark.parametrize(
    ("words", "advice"),
    [(WORDS, "Give --set unlearning.relative_loss_increase=0.2"), (api.WORDS, r"Give AttributionOptions\(settings=")],
    ids=["command", "python"],
)
def test_a_loss_increase_out_of_reach_is_answered_in_the_interfaces_words(words: dict[str, str], advice: str) -> None:
    with pytest.raises(ValueError, match=rf"No step size raises .*{advice}"), option_names(words):
        alpha_for_increase(lambda alpha: 0.1, 0.2, 1.0)


def test_the_root_takes_no_abbreviations() -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--vers"])
