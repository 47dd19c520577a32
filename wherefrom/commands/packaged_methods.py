"""Methods by name or file, with the settings that the console command and `attribute_images` start from."""

from __future__ import annotations

import difflib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wherefrom.commands.method_files import (
    RENAMED_METHODS,
    available_methods,
    load_methods,
    method_file,
    methods_folder,
)

if TYPE_CHECKING:
    from wherefrom.attributors.base import Attributor

DEFAULT_METHOD = "abu_plus"
# The step that docs/methods.md found right for AbU+ on both emoji models. The file's 0.2 is that of the committed
# tables: so small a step often gives the wrong signs.
STEP: Mapping[str, Mapping[str, Any]] = {"abu_plus": {"unlearning.relative_loss_increase": 1.0}}
# A first look: what a method takes most of its time for, cut down. Never more than a method has by itself.
QUICK: Mapping[str, int] = {
    "grid.timesteps": 4,
    "unlearning.noise_samples": 200,
    "unlearning.measurement_samples": 100,
    "noise_samples": 200,
    "fisher.samples_per_image": 1,
}
QUICK_NOTE = (
    "A quick look: at most 4 timesteps and 200 noise samples were measured, so the order is noisy and not for a claim. "
    "Leave the quick option out for one."
)


def find_method(name: str) -> Path:
    """The file of a packaged method, or the user's own YAML file.

    Args:
        name: A packaged method's name, or a path that ends with `.yaml` or `.yml`.

    Raises:
        ValueError: There is no such method; the closest name is suggested.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"method: there is no file {name!r}.")
        return Path(name).resolve()
    if name in RENAMED_METHODS or name in available_methods():
        return method_file(name)
    close = difflib.get_close_matches(name, available_methods(), 1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"method: {name!r} is neither a packaged method nor a YAML file; {meant}see wherefrom methods.")


def load_packaged(
    names: Sequence[str], settings: Mapping[str, Any] | None = None, quick: bool = False
) -> dict[str, Attributor]:
    """Attributors by their names, or by their files' names.

    Args:
        names: See `find_method`.
        settings: Values that replace the files', such as `unlearning.noise_samples`, in every method that has them,
            also in those that a method asks; each must be some method's.
        quick: Cut down what takes most of the time; `settings` win.

    Raises:
        ValueError: A method is unknown or named twice, a file describes none, or a setting is no method's or has no
            such value.
    """
    given = dict(settings or {})
    files: list[Path] = []
    for name in names:
        files.append(find_method(name))
        if files[-1].stem in [file.stem for file in files[:-1]]:
            raise ValueError(
                f"method: two methods are called {files[-1].stem!r}: runs are told apart by name, rename one."
            )
    if given:
        _load(files, given, strict=True)  # refuses what no method has; what follows is not every method's
    methods: dict[str, Attributor] = {}
    for file in files:
        own = dict(STEP.get(file.stem, {})) if file.parent == methods_folder() else {}
        own |= quick_settings(file) if quick else {}
        methods |= _load([file], {**own, **given}, strict=False)
    return methods


def _load(files: Sequence[Path], settings: Mapping[str, Any], strict: bool) -> dict[str, Attributor]:
    """The files' methods with the settings that they have."""
    named, said = ", ".join(file.stem for file in files), io.StringIO()
    try:
        with redirect_stderr(said):  # jsonargparse prints its usage, which is not that of any command here
            made = load_methods(files, settings, strict=strict)
    except SystemExit as error:  # how jsonargparse ends where a file does not fit
        raise ValueError(
            f"method: {', '.join(map(str, files))} does not describe a method: {reason(error.__context__ or error)}"
        ) from error
    except (ValueError, TypeError) as error:
        if str(error).startswith("settings:"):
            raise
        raise ValueError(f"method: {named} cannot be set up so: {reason(error)}") from error
    sys.stderr.write(said.getvalue())  # warnings, such as of a setting's earlier name
    return made


def reason(error: BaseException) -> str:
    """What jsonargparse's report of several lines comes to: the first of its reasons."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line.removeprefix("- ") for line in lines if line.startswith("- ") and "NoneType" not in line]
    said = reasons[-1] if reasons else lines[0] if lines else type(error).__name__
    return said if said.endswith(".") else f"{said}."


def quick_settings(file: Path) -> dict[str, int]:
    """The settings of `QUICK` that make this method faster: those that it has not set lower itself."""
    import yaml

    trees = list(_init_args(yaml.safe_load(file.read_text(encoding="utf-8"))))
    return {key: most for key, most in QUICK.items() if all(_value(tree, key, most + 1) > most for tree in trees)}


def _init_args(tree: Any) -> Iterator[Mapping[str, Any]]:
    """The arguments of a described object, and of those that it is given."""
    if isinstance(tree, list):
        for each in tree:
            yield from _init_args(each)
    elif isinstance(tree, Mapping):
        if isinstance(tree.get("init_args"), Mapping):
            yield tree["init_args"]
        for each in tree.values():
            yield from _init_args(each)


def _value(tree: Mapping[str, Any], key: str, absent: int) -> float:
    """A nested number; `absent` where the file does not set it."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, int | float) else absent
