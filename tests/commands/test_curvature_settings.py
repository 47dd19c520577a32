"""The earlier form of a method's curvature in YAML makes the same method as the present one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import evaluate
from wherefrom.attributors import AttributionByUnlearning, InfluenceFunction
from wherefrom.commands import curvature_settings
from wherefrom.commands.curvature_settings import curvature_in_new_form, words_in_new_form
from wherefrom.commands.method_files import load_methods, method_file
from wherefrom.curvature import EKFAC, DiagonalFisher, FisherSettings, Identity

OLD: dict[str, dict[str, Any]] = {
    "default": {"fisher": {"samples_per_image": 2}},
    "word": {"curvature": "ekfac"},
    "all": {
        "curvature": "ekfac",
        "fisher": {"samples_per_image": 3, "seed": 1},
        "damping": 0.2,
        "layers_per_pass": 4,
        "fisher_path": "somewhere",
        "curvature_from": "base",
    },
    "unused": {"curvature": "diagonal", "layers_per_pass": 4},
    "sgd": {"unlearning": {"newton": False}, "fisher": {"samples_per_image": 2}},
}
NEW = {
    "default": AttributionByUnlearning(curvature=DiagonalFisher(FisherSettings(2))),
    "word": AttributionByUnlearning(curvature=EKFAC()),
    "all": AttributionByUnlearning(curvature=EKFAC(FisherSettings(3, 1), 0.2, 4, "somewhere", "base")),
    "unused": AttributionByUnlearning(),
}


def write(folder: Path, name: str, arguments: dict[str, Any], kind: str = "AttributionByUnlearning") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"class_path": kind, "init_args": arguments}))
    return path


@pytest.mark.parametrize("name", list(NEW))
def test_the_old_form_makes_the_same_method(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curvature_settings._print_warning.cache_clear()
    made = load_methods([write(tmp_path, name, OLD[name])])[name]
    assert made.identity() == NEW[name].identity()
    assert isinstance(made, AttributionByUnlearning)
    assert type(made.curvature) is type(NEW[name].curvature)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "class_path: EKFAC" in said


def test_an_unused_curvature_is_recorded_as_before(tmp_path: Path) -> None:
    (method,) = load_methods([write(tmp_path, "sgd", OLD["sgd"])]).values()
    identity = method.identity()
    assert identity["curvature"] == "identity"
    assert identity["fisher"] == {"visits": 2, "seed": 0, "flips": True}
    old = {"curvature": "identity", "fisher": {"samples_per_image": 2}, "damping": 0.5}
    (plain,) = load_methods([write(tmp_path, "plain", old, "InfluenceFunction")]).values()
    assert isinstance(plain, InfluenceFunction)
    assert isinstance(plain.curvature, Identity)
    assert plain.identity()["fisher"] == {"visits": 2, "seed": 0, "flips": True}
    assert plain.identity()["damping"] == 0.5
    assert plain.identity()["curvature"] == "identity"


def test_settings_are_found_in_the_curvature(tmp_path: Path) -> None:
    new = {"curvature": {"class_path": "EKFAC", "init_args": {"fisher": {"samples_per_image": 5}, "damping": 0.3}}}
    files = [write(tmp_path, "plus", new), write(tmp_path, "plain", {})]
    settings = {"fisher.samples_per_image": 2, "plain/damping": 0.7}
    methods = load_methods(files, settings, {"whole": {"plus/curvature": "diagonal"}}, strict=True)
    for method in methods.values():
        assert method.identity()["fisher"]["visits"] == 2
    assert [method.identity()["damping"] for method in methods.values()] == [0.3, 0.7, 0.3]
    assert [method.identity()["curvature"] for method in methods.values()] == ["ekfac", "diagonal", "diagonal"]
    (none,) = load_methods(files[:1], {"curvature": "identity", "damping": 0.9}).values()
    assert none.identity()["curvature"] == "identity"
    with pytest.raises(ValueError, match="Unknown curvature 'kfac'; choose DiagonalFisher, EKFAC or Identity"):
        load_methods(files, {"curvature": "kfac"})


def test_methods_inside_methods_are_translated() -> None:
    inner = {"class_path": "wherefrom.attributors.InfluenceBank", "init_args": {"damping": 0.2}}
    content = {"attributor": {"class_path": "Magnitude", "init_args": {"method": inner}}, "others": [inner]}
    new = {
        "class_path": "wherefrom.attributors.InfluenceBank",
        "init_args": {"curvature": {"class_path": "EKFAC", "init_args": {"damping": 0.2}}},
    }
    assert curvature_in_new_form(content) == {
        "attributor": {"class_path": "Magnitude", "init_args": {"method": new}},
        "others": [new],
    }
    assert curvature_in_new_form(new) == new
    trak = {"class_path": "TRAK", "init_args": {"damping": 1}}
    assert curvature_in_new_form(trak) == trak


def test_what_is_given_both_ways_or_unknown_is_refused() -> None:
    both = {"class_path": "InfluenceFunction", "init_args": {"curvature": {"class_path": "EKFAC"}, "damping": 0.1}}
    with pytest.raises(ValueError, match="InfluenceFunction: damping stand beside curvature"):
        curvature_in_new_form(both)
    with pytest.raises(ValueError, match=r"unknown curvature 'kfac'.*DiagonalFisher, EKFAC or Identity"):
        curvature_in_new_form({"class_path": "InfluenceFunction", "init_args": {"curvature": "kfac"}})


def test_flags_of_the_old_form_are_renamed() -> None:
    inside = "curvature.init_args"
    assert words_in_new_form(
        ["attribute", "--attributor", "abu.yaml", "--attributor.init_args.fisher.samples_per_image", "2"]
    ) == ["attribute", "--attributor", "abu.yaml", f"--attributor.init_args.{inside}.fisher.samples_per_image", "2"]
    assert words_in_new_form(["--model.damping=0.2"]) == [f"--model.{inside}.damping=0.2"]
    assert words_in_new_form(["--teacher.init_args.curvature", "ekfac"]) == ["--teacher.init_args.curvature", "EKFAC"]
    assert words_in_new_form(["--teacher.curvature=diagonal"]) == ["--teacher.curvature=DiagonalFisher"]
    same = ["--attributor.init_args.grid.timesteps", "4", "--data.fisher", "x", "diagonal", "--output=a=b"]
    assert words_in_new_form(same) == same
    new = [f"--attributor.init_args.{inside}.damping", "0.2"]
    assert words_in_new_form(new) == new


def test_flags_reach_the_curvature_of_a_file() -> None:
    words = ["attribute", "--model", "m", "--data", "ImageFolder", "--data.init_args.folder", "f", "--output", "o"]
    old = ["--attributor", str(method_file("abu_plus")), "--attributor.init_args.fisher", '{"samples_per_image": 1}']
    parser = evaluate.parser()
    config = parser.parse_args(words_in_new_form([*words, *old]))
    method = parser.instantiate(config).attribute.attributor
    assert (
        method.identity()
        == AttributionByUnlearning(unlearning=method.unlearning, curvature=EKFAC(FisherSettings(1))).identity()
    )
