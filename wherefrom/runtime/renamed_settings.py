"""Old names of settings and classes, accepted for this release with one line of warning.

A run's settings come from YAML files, from values on the command line and from dotted flags. All three may still use
the names of the release before: an experiment file that a user wrote, the `config.yaml` beside an old training, a
command in somebody's notes. The tables here say what each old name is called now. Identities of artifacts are another
matter: see `stable_names`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wherefrom.runtime.stable_names import current

ANYWHERE = ""
# (key that holds it, old key) -> new key; `ANYWHERE` is for names that meant one thing wherever they stood.
KEYS: Mapping[tuple[str, str], str] = {
    (ANYWHERE, "draws"): "noise_samples",
    (ANYWHERE, "measure_draws"): "measurement_samples",
    (ANYWHERE, "rise"): "relative_loss_increase",
    ("fisher", "visits"): "samples_per_image",
    ("queries", "pictures"): "images",
    (ANYWHERE, "halves"): "random_subsets",
    ("protocol", "pools"): "query_groups",
    ("protocol", "ladder"): "random_removal_curve",
    ("protocol", "ladder_draws"): "random_removal_samples",
    ("protocol", "after"): "reattributed_queries",
    ("protocol", "groups"): "additivity_groups",
    ("protocol", "greedy"): "iterative_removal_rounds",
    (ANYWHERE, "skip_unreadable"): "on_error",
}
# Old key -> what its values are called by its new name.
VALUES: Mapping[str, Mapping[str, str]] = {"skip_unreadable": {"true": "skip", "false": "stop"}}
# Bare class names.
CLASSES: Mapping[str, str] = {"Fast": "LearnedRanker", "AmongNearest": "Rerank", "BySize": "Magnitude"}
# Modules that YAML named classes of.
MODULES: Mapping[str, str] = {
    "wherefrom.attributors.among": "wherefrom.attributors.rerank",
    "wherefrom.attributors.bank": "wherefrom.attributors.influence.banked",
    "wherefrom.attributors.baselines": "wherefrom.attributors.similarity",
    "wherefrom.attributors.by_size": "wherefrom.attributors.magnitude",
    "wherefrom.attributors.ensemble": "wherefrom.attributors.rank_ensemble",
    "wherefrom.attributors.fast": "wherefrom.attributors.learned_ranker",
    "wherefrom.attributors.journey_trak": "wherefrom.attributors.trak.journey",
    "wherefrom.encoders": "wherefrom.features.pretrained",
    "wherefrom.features": "wherefrom.features.base",
    "wherefrom.muon": "wherefrom.training.muon",
    "wherefrom.parts": "wherefrom.models.factories",
    "wherefrom.pipeline": "wherefrom.models.pipeline",
    "wherefrom.prompts": "wherefrom.models.prompt_encoders",
    "wherefrom.ranker": "wherefrom.distillation.ranker",
    "wherefrom.ranking_losses": "wherefrom.distillation.losses",
    "wherefrom.schedules": "wherefrom.training.lr_schedules",
}
# Keys and flags whose plain value is the name of a class.
_NAMING_A_CLASS = frozenset({"class_path", "attributor", "teacher", "nearest", "method", "similarity"})
_PARENTS = frozenset(parent for parent, _ in KEYS if parent)
Change = tuple[str, str]


def class_now(path: str) -> str:
    """What a class is called now, by its bare name or its dotted path; other text is returned as it is."""
    if path in CLASSES:
        return CLASSES[path]
    known = current(path)
    if known != path:
        return known
    module, _, name = path.rpartition(".")
    if not module.startswith("wherefrom"):
        return path
    return f"{MODULES.get(module, module)}.{CLASSES.get(name, name)}"


def _key_now(key: str, parent: str) -> str:
    """What a key is called now, below the key `parent`; `abu/unlearning.rise` is followed from part to part."""
    method, slash, dotted = key.rpartition("/")
    parts = dotted.split(".")
    for place, part in enumerate(parts):
        above = parent if place == 0 else next((p for p in reversed(parts[:place]) if p != "init_args"), parent)
        parts[place] = KEYS.get((above, part), KEYS.get((ANYWHERE, part), part))
    return f"{method}{slash}{'.'.join(parts)}"


def renamed(content: Any, parent: str = "") -> tuple[Any, list[Change]]:
    """What YAML holds, by the names of today.

    Args:
        content: Dictionaries, lists, strings, numbers.
        parent: The key that holds it; "" at the top of a file, where a group's own file may begin.

    Returns:
        The content, and (old, new) of each name that was changed.

    Raises:
        ValueError: A setting is given by its old and by its new name.
    """
    changes: list[Change] = []
    if isinstance(content, list):
        result: list[Any] = []
        for each in content:
            value, inner = renamed(each, parent)
            result.append(value)
            changes += inner
        return result, changes
    if not isinstance(content, Mapping):
        return content, changes
    made: dict[Any, Any] = {}
    for key, each in content.items():
        new = _key_now(key, parent) if isinstance(key, str) else key
        if new == key and parent == "" and isinstance(key, str):
            new = _key_of_a_group(key, content)
        if new != key:
            changes.append((key, new))
        if new in made or (new != key and new in content):
            raise ValueError(f"{new!r} is given twice, also by its old name {key!r}: leave the old one out.")
        if new != key and key in VALUES:
            made[new] = VALUES[key].get(str(each).lower(), each)
            continue
        if key in _NAMING_A_CLASS and isinstance(each, str):
            made[new] = class_now(each)
            if made[new] != each:
                changes.append((each, made[new]))
            continue
        # `init_args` is a step of the file's format, not a name: what counts is what the class is given to.
        below = parent if key == "init_args" else str(new).rpartition("/")[2].rpartition(".")[2]
        made[new], inner = renamed(each, below)
        changes += inner
    return made, changes


def _key_of_a_group(key: str, content: Mapping[Any, Any]) -> str:
    """A key at the top of a file that holds one group, such as configs/queries/….yaml."""
    of_queries = {"prompts", "sampling_steps", "eta", "guidance", "resize", "regions"} & content.keys()
    return KEYS.get(("queries", key), key) if of_queries and "data" not in content else key


def current_names(*settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings that Python code gives, by the names of today, with one line of warning where that changes any.

    Raises:
        ValueError: A setting is given by its old and by its new name.
    """
    with _collecting() as seen:
        result = []
        for each in settings:
            content, changes = renamed(each)
            result.append(content)
            seen.changes += [("settings", old, new) for old, new in changes]
    return result


def renamed_words(words: Sequence[str]) -> tuple[list[str], list[Change]]:
    """Words of a command line by the names of today: dotted flags, and the values of flags.

    Raises:
        ValueError: A setting is given by its old and by its new name.
    """
    result: list[str] = []
    changes: list[Change] = []
    flag = before = ""
    given: dict[str, str] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flag, before = _key_now(name, ""), name
            if flag != name:
                changes.append((f"--{name}", f"--{flag}"))
            if given.setdefault(flag, name) != name:
                old = name if name != flag else given[flag]
                raise ValueError(f"--{flag} is given twice, also by its old name --{old}: leave the old one out.")
            if equals:
                value, inner = _value_now(_by_new_name(value, before), flag)
                changes += inner
            result.append(f"--{flag}{equals}{value}")
            continue
        value, inner = _value_now(_by_new_name(word, before), flag)
        changes += inner
        result.append(value)
    return result, changes


def _by_new_name(value: str, old: str) -> str:
    """What a value is called, now that its flag has another name."""
    return VALUES.get(old.rpartition(".")[2], {}).get(value.lower(), value)


def _value_now(value: str, flag: str) -> tuple[str, list[Change]]:
    """The value of a flag; only text that changes is written anew."""
    parts = [part for part in flag.split(".") if part != "init_args"]
    if parts[-1] in _NAMING_A_CLASS:
        new = class_now(value)
        if new != value:
            return new, [(value, new)]
    if value.lstrip()[:1] not in ("{", "["):
        return value, []
    import yaml  # comes with the command line

    try:
        content = yaml.safe_load(value)
    except yaml.YAMLError:
        return value, []
    new_content, changes = renamed(content, parts[-1])
    return (json.dumps(new_content) if changes else value), changes


@dataclass
class _Seen:
    """Old names that one run used, and the files that it may have read them from."""

    changes: list[tuple[str, str, str]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def mention(self, content: Any, folder: Path) -> None:
        """Remembers file names that settings hold, relative to what names them."""
        if isinstance(content, str):
            if content.endswith((".yaml", ".yml", ".json")):
                self.files.append(folder.absolute() / content)
        elif isinstance(content, Mapping | list):
            for each in content.values() if isinstance(content, Mapping) else content:
                self.mention(each, folder)

    def file_of(self, text: str) -> Path | None:
        """The mentioned file that holds this text; the command line's parser does not say what it reads."""
        for file in dict.fromkeys(self.files):
            if file.is_file() and file.read_text() == text:
                return file
        return None

    def line(self) -> str:
        """One line for all that was seen."""
        by_place: dict[str, list[str]] = {}
        for place, old, new in dict.fromkeys(self.changes):
            by_place.setdefault(place, []).append(f"{old} → {new}")
        listed = "; ".join(f"{place}: {', '.join(each)}" for place, each in by_place.items())
        return f"warning: old names, which the next release refuses: {listed}"


_SEEN: ContextVar[_Seen | None] = ContextVar("old names of this run", default=None)
_INSTALLED: list[Callable[..., Any]] = []


@contextmanager
def accepting_old_names(words: Sequence[str] = ()) -> Iterator[list[str]]:
    """Yields the words of a command line by the names of today; files that are read inside may use old names too.

    Prints one line of warning at the end where any were used. Inside another such block the outer one prints it.

    Args:
        words: The command line, or no words where only files are read.

    Raises:
        ValueError: A setting is given by its old and by its new name.
    """
    _hook_loader()
    with _collecting() as seen:
        result, changes = renamed_words(words)
        seen.changes += [("the command line", old, new) for old, new in changes]
        for word in result:
            seen.mention(word.rpartition("=")[2], Path())
        yield result


def mention(place: str, old: str, new: str) -> bool:
    """Adds an old name to the line of warning of the run; False where no block collects one.

    Args:
        place: Where it was read.
        old: What was written.
        new: What to write instead.
    """
    seen = _SEEN.get()
    if seen is not None:
        seen.changes.append((place, old, new))
    return seen is not None


@contextmanager
def _collecting() -> Iterator[_Seen]:
    outer = _SEEN.get()
    seen = outer or _Seen()
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)
        if outer is None and seen.changes:
            print(seen.line(), file=sys.stderr)


def _hook_loader() -> None:
    """Makes jsonargparse read YAML by the names of today wherever a block of `accepting_old_names` is open."""
    from jsonargparse import ArgumentParser, get_loader, set_loader

    if _INSTALLED and get_loader("omegaconf") is _INSTALLED[0]:
        return
    import yaml

    ArgumentParser(parser_mode="omegaconf").parse_string("{}")  # its first use makes the loader that is wrapped here

    original = get_loader("omegaconf")

    def load(text: str, path: Any = "") -> Any:
        content, seen = original(text), _SEEN.get()
        if seen is None or not isinstance(content, dict | list):
            return content
        try:
            result, changes = renamed(content)
        except ValueError as error:
            place = seen.file_of(text) or path or "the command line"
            raise _GivenTwiceError(f"{place}: {error}") from error
        file = seen.file_of(text) or (Path(str(path)) if path else None)
        seen.mention(result, file.parent if file is not None else Path())
        seen.changes += [(str(file or "a value"), old, new) for old, new in changes]
        return result

    set_loader("omegaconf", load, (yaml.YAMLError,))
    _INSTALLED[:] = [load]


class _GivenTwiceError(ValueError):
    """A file gives a setting by both names."""
