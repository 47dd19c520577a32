"""Methods from the files that describe them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wherefrom.attributors import Attributor

if TYPE_CHECKING:
    from jsonargparse import Namespace


def methods_of(config: Any) -> dict[str, Attributor]:
    """The methods that a command's `methods` and `settings` name.

    Raises:
        ValueError: As for `load_methods`, with every setting required to be some method's.
    """
    return load_methods([Path(str(file.absolute)) for file in config.methods], config.settings, strict=True)


def load_methods(
    files: Sequence[Path], settings: Mapping[str, Any] | None = None, strict: bool = False
) -> dict[str, Attributor]:
    """The attributors of these files, by the files' names.

    Args:
        files: Attributor files.
        settings: Values that replace those of the files, such as `grid.timesteps`, in every method that has them, also
            in those that a method asks; `influence/draws` is for the method of influence.yaml alone, and wins.
        strict: Refuse a setting that no method has.

    Raises:
        ValueError: Two files have the same name, or no method has a setting.
    """
    from jsonargparse import ArgumentParser  # comes with the command line; the library does without it

    made = ArgumentParser(parser_mode="omegaconf")
    made.add_subclass_arguments(Attributor, "attributor", required=True)
    methods: dict[str, Attributor] = {}
    settings = settings or {}
    unused = set(settings)
    for file in files:
        if file.stem in methods:
            raise ValueError(f"Two attributor files are called {file.stem!r}: rename one, runs are told apart by name.")
        config = made.parse_args(["--attributor", str(file)])
        # The method's own come last and replace the general ones.
        meant = [(name, name) for name in settings if "/" not in name]
        meant += [(name, name.removeprefix(f"{file.stem}/")) for name in settings if name.startswith(f"{file.stem}/")]
        for init_args in _arguments(config.attributor):
            for name, key in meant:
                if init_args.get(key) is not None:
                    init_args[key] = settings[name]
                    unused.discard(name)
        methods[file.stem] = made.instantiate(config).attributor
    if strict and unused:
        raise ValueError(f"settings: no method has {sorted(unused)[0]!r}; the methods are {', '.join(methods)}.")
    return methods


def _arguments(parsed: Any) -> Iterator[Namespace]:
    """The arguments of parsed classes, and of those that they are given."""
    from jsonargparse import Namespace

    for each in parsed if isinstance(parsed, list) else [parsed]:
        if isinstance(each, Namespace) and "init_args" in each:
            yield each.init_args
            for value in vars(each.init_args).values():
                yield from _arguments(value)
