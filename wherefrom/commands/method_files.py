"""Methods from the files that describe them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wherefrom.attributors import Attributor
from wherefrom.runtime.renamed_settings import accepting_old_names, current_names

if TYPE_CHECKING:
    from jsonargparse import Namespace


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
            in those that a method asks; `influence/noise_samples` is for the method of influence.yaml alone, and wins.
        variants: Name of a further method -> settings of one of the files' methods, as `influence/noise_samples`, which
            win over `settings`.
        strict: Refuse a setting that no method has.

    Raises:
        ValueError: Two methods have the same name, no method has a setting, or a variant is not of one of the methods.
    """
    from jsonargparse import ArgumentParser  # comes with the command line; the library does without it

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
                if init_args.get(key) is not None:
                    init_args[key] = given[name]
                    had.add(name)
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
    """The arguments of parsed classes, and of those that they are given."""
    from jsonargparse import Namespace

    for each in parsed if isinstance(parsed, list) else [parsed]:
        if isinstance(each, Namespace) and "init_args" in each:
            yield each.init_args
            for value in vars(each.init_args).values():
                yield from _arguments(value)
