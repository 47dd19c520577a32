"""The earlier form of a method's curvature in YAML, accepted for this release with one line of warning.

It was a word, `curvature: ekfac`, with the settings of the Fisher information beside it (`fisher`, `damping`,
`layers_per_pass`, `fisher_path`, `curvature_from`). Now it is an object that holds them:
`curvature: {class_path: EKFAC, init_args: {fisher: …}}`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from wherefrom.runtime.renamed_settings import mention

if TYPE_CHECKING:
    from jsonargparse import Namespace

FORMS: Mapping[str, str] = {"diagonal": "DiagonalFisher", "ekfac": "EKFAC", "identity": "Identity"}
SETTINGS = ("fisher", "damping", "layers_per_pass", "fisher_path", "curvature_from")
# A flag of a method, or of a method that one is given: --attributor.init_args.method.init_args.
_METHOD = r"--(?:attributor|teacher|nearest|model)\.(?:init_args\.)?(?:(?:method|nearest)\.(?:init_args\.)?)*"
_FLAG = re.compile(rf"({_METHOD})({'|'.join(SETTINGS)})(?=\.|$)")
_CURVATURE_FLAG = re.compile(rf"{_METHOD}curvature")
# Classes with a curvature, and the form that each takes by default.
DEFAULTS: Mapping[str, str] = {
    "AttributionByUnlearning": "diagonal",
    "InfluenceBank": "ekfac",
    "InfluenceFunction": "ekfac",
    "Unlearning": "diagonal",
}


def curvature_in_new_form(content: Any) -> Any:
    """What YAML holds, with every curvature as an object; what is in that form already is returned as it is.

    Args:
        content: Dictionaries, lists, strings, numbers.

    Raises:
        ValueError: The word of a curvature is unknown, or its settings are given both ways.
    """
    if isinstance(content, list):
        return [curvature_in_new_form(each) for each in content]
    if not isinstance(content, Mapping):
        return content
    result = {key: curvature_in_new_form(each) for key, each in content.items()}
    name = str(result.get("class_path")).rpartition(".")[2]
    if name in DEFAULTS and isinstance(result.get("init_args"), dict):
        result["init_args"] = _arguments_in_new_form(name, result["init_args"])
    return result


def _arguments_in_new_form(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a class with a curvature."""
    word = arguments.get("curvature", DEFAULTS[name])
    beside = {key: arguments[key] for key in SETTINGS if key in arguments}
    if isinstance(word, Mapping) or word in FORMS.values():
        if beside:
            raise ValueError(
                f"{name}: {', '.join(beside)} stand beside curvature, which is an object: move them into its init_args."
            )
        return arguments
    if word not in FORMS:
        raise ValueError(
            f"{name}: unknown curvature {word!r}; write curvature: {{class_path: NAME}} with DiagonalFisher, EKFAC or "
            "Identity."
        )
    if "curvature" not in arguments and not beside:
        return arguments
    _warn()
    rest = {key: value for key, value in arguments.items() if key not in SETTINGS}
    return {**rest, "curvature": _object(word, beside)}


def _object(word: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The object that a word and its settings have become."""
    if word == "identity":
        # Its settings were recorded in identities although they had no effect.
        recorded = {"recorded": _object("diagonal", settings)} if settings else {}
        return {"class_path": FORMS[word], "init_args": recorded}
    known = {key: value for key, value in settings.items() if word == "ekfac" or key != "layers_per_pass"}
    return {"class_path": FORMS[word], "init_args": known}


def words_in_new_form(words: Sequence[str]) -> list[str]:
    """Words of a command line, with flags of the earlier form such as `--attributor.init_args.damping` renamed."""
    result: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        renamed = _FLAG.sub(r"\g<1>curvature.init_args.\g<2>", flag)
        if renamed != flag:
            _warn()
        names_a_form = _CURVATURE_FLAG.fullmatch(flag if equals else (result[-1] if result else ""))
        if names_a_form and (value if equals else word) in FORMS:
            _warn()
            result.append(f"{flag}={FORMS[value]}" if equals else FORMS[word])
        else:
            result.append(renamed + equals + value)
    return result


def replace_curvature(init_args: Namespace, word: str) -> None:
    """Replaces the form of a parsed method's curvature and keeps its other settings.

    Args:
        init_args: The method's parsed arguments.
        word: The name of the new form, or its earlier word.

    Raises:
        ValueError: The word is unknown.
    """
    from jsonargparse import Namespace

    name = FORMS.get(word, word)
    if name not in FORMS.values():
        raise ValueError(f"Unknown curvature {word!r}; choose DiagonalFisher, EKFAC or Identity.")
    former = init_args.curvature
    if name == "Identity":
        values = {"recorded": former}
    else:
        values = {"layers_per_pass": None, **vars(former.init_args)}
        if name != "EKFAC":
            values.pop("layers_per_pass")
    made: Callable[..., Namespace] = Namespace
    init_args.curvature = made(class_path=f"wherefrom.curvature.{name}", init_args=made(**values))


def accept_old_curvature() -> None:
    """Makes jsonargparse read the earlier form too, in every file and value that it loads from now on."""
    from jsonargparse import ArgumentParser, get_loader, set_loader

    if _hooked:
        return
    import yaml

    ArgumentParser(parser_mode="omegaconf").parse_string("{}")  # makes the loader that is wrapped here
    original = get_loader("omegaconf")
    with_path = "path" in signature(original).parameters

    def load(text: str, path: Any = "") -> Any:
        return curvature_in_new_form(original(text, path) if with_path else original(text))

    set_loader("omegaconf", load, (yaml.YAMLError,))
    _hooked.append(True)


_hooked: list[bool] = []


def _warn() -> None:
    """Adds the earlier form to the run's line of warning, or prints a line of its own, once."""
    if not mention("a method", "curvature: ekfac", "curvature: {class_path: EKFAC, init_args: {fisher: …}}"):
        _print_warning()


@cache
def _print_warning() -> None:
    print(
        "warning: `curvature: ekfac` with `fisher` or `damping` beside it goes in the next release; write "
        "`curvature: {class_path: EKFAC, init_args: {fisher: …}}`.",
        file=sys.stderr,
    )
