"""Method files: the packaged ones by name, and the attributors that method files describe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wherefrom.commands.curvature_settings import accept_old_curvature, replace_curvature
from wherefrom.runtime.renamed_settings import accepting_old_names, current_names

if TYPE_CHECKING:  # `available_methods` and `method_file` answer without loading PyTorch
    from jsonargparse import Namespace

    from wherefrom.attributors.base import Attributor

# Packaged files that were renamed: earlier name -> name now.
RENAMED_METHODS: Mapping[str, str] = {
    "abu_plus_bank": "abu_plus_rerank_bank",
    "abu_plus_by_size": "abu_plus_magnitude",
    "abu_plus_nearest": "abu_plus_rerank",
    "abu_plus_two_noises": "abu_plus_two_seeds",
    "fast": "learned_ranker_emoji_1k",
    "fast_trained": "learned_ranker",
    "influence_by_size": "influence_magnitude",
}


def methods_folder() -> Path:
    """The folder of the packaged method files."""
    return Path(str(package_files("wherefrom"))) / "methods"


def available_methods() -> Mapping[str, str]:
    """The packaged methods with a line about each, in alphabetical order.

    Returns:
        Name of the method -> the first comment line of its file.
    """
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        for path in sorted(methods_folder().glob("*.yaml"))
    }


def method_file(name_or_path: str | Path) -> Path:
    """The file of a method: a packaged method's by its name, any other by its path.

    The name that a packaged file had before it was renamed is accepted too, with a line of warning on stderr.

    Args:
        name_or_path: Such as `abu_plus`, or `my/method.yaml`. Where both a packaged method and a path are meant, the
            path is given with its suffix.

    Raises:
        ValueError: There is neither a packaged method nor a file of that name; the packaged methods are listed.
    """
    path = Path(name_or_path)
    packaged = methods_folder()
    if path.suffix in (".yaml", ".yml", ".json"):
        if path.exists():
            return path
        renamed = path.with_stem(RENAMED_METHODS.get(path.stem, path.stem))
        if renamed != path and renamed.exists():
            _warn_renamed(path.stem, renamed.stem)
            return renamed
        raise ValueError(f"There is no method file {path}; the packaged methods are {', '.join(available_methods())}.")
    name = str(name_or_path)
    if name in RENAMED_METHODS:
        _warn_renamed(name, RENAMED_METHODS[name])
        name = RENAMED_METHODS[name]
    if name in available_methods():
        return packaged / f"{name}.yaml"
    raise ValueError(
        f"There is no method {name!r}. Give the path of a method file (.yaml), or one of the packaged methods: "
        f"{', '.join(available_methods())}."
    )


def _warn_renamed(old: str, new: str) -> None:
    print(f"warning: the method {old!r} is now called {new!r}; the old name goes in the next release.", file=sys.stderr)


def load_methods(
    files: Sequence[Path],
    settings: Mapping[str, Any] | None = None,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    strict: bool = False,
) -> dict[str, Attributor]:
    """The attributors of these files, by the files' names.

    Args:
        files: Attributor files.
        settings: Values that replace those of the files, such as `grid.timesteps`, in every method that has them, also
            in the objects that a method is given: `fisher.samples_per_image` is found in its curvature, and
            `unlearning.steps` in the method that `Rerank` is given. `influence/noise_samples` is for the method of
            influence.yaml alone, and wins.
        variants: Name of a further method -> settings of one of the files' methods, as `influence/noise_samples`, which
            win over `settings`.
        strict: Refuse a setting that no method has.

    Raises:
        ValueError: Two methods have the same name, no method has a setting, or a variant is not of one of the methods.
    """
    from jsonargparse import ArgumentParser  # comes with the command line; the library does without it

    from wherefrom.attributors import Attributor

    accept_old_curvature()
    made = ArgumentParser(parser_mode="omegaconf")
    made.add_subclass_arguments(Attributor, "attributor", required=True)
    methods: dict[str, Attributor] = {}
    (settings, variants), used = current_names(settings or {}, variants or {}), set[str]()

    def load(file: Path, given: Mapping[str, Any]) -> tuple[Attributor, set[str]]:
        """A file's method, and the names of the settings that it has."""
        with accepting_old_names([str(file)]):
            config, had = made.parse_args(["--attributor", str(file)]), set()
        # The method's own come last and replace the general ones.
        meant = [(name, name) for name in given if "/" not in name]
        meant += [(name, name.removeprefix(f"{file.stem}/")) for name in given if name.startswith(f"{file.stem}/")]
        for init_args in _arguments(config.attributor):
            for name, key in meant:
                if init_args.get(key) is None:
                    continue
                had.add(name)
                if key == "curvature" and isinstance(given[name], str):
                    replace_curvature(init_args, given[name])
                else:
                    init_args[key] = given[name]
        return made.instantiate(config).attributor, had

    for file in files:
        if file.stem in methods:
            raise ValueError(f"Two attributor files are called {file.stem!r}: rename one, runs are told apart by name.")
        methods[file.stem], had = load(file, settings)
        used |= had
    by_name = {file.stem: file for file in files}
    for variant, changes in variants.items():
        of = {name.partition("/")[0] for name in changes}
        named = variant not in methods and Path(variant).name == variant  # it becomes a folder's
        if not named or len(of) != 1 or not of <= set(by_name):
            raise ValueError(
                f"variants: {variant!r} needs a name of its own, without slashes, and settings of one of the methods "
                f"({', '.join(by_name)}), such as {next(iter(by_name), 'METHOD')}/noise_samples; given {dict(changes)}."
            )
        methods[variant], had = load(by_name[of.pop()], {**settings, **changes})
        if strict and changes.keys() - had:
            raise ValueError(f"variants: {variant!r} has no {min(changes.keys() - had)!r}.")
        used |= had
    if strict and settings.keys() - used:
        raise ValueError(
            f"settings: no method has {min(settings.keys() - used)!r}; the methods are {', '.join(methods)}."
        )
    return methods


def _arguments(parsed: Any) -> Iterator[Namespace]:
    """The arguments of parsed classes, and of the objects that they are given."""
    from jsonargparse import Namespace

    for each in parsed if isinstance(parsed, list) else [parsed]:
        if isinstance(each, Namespace) and "init_args" in each:
            yield each.init_args
            for value in vars(each.init_args).values():
                yield from _arguments(value)
