"""Salts: no value is given twice but the two that history gave, and none ever changes."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

from wherefrom.runtime import keyed_random
from wherefrom.runtime.salts import HISTORIC_ALIASES, Salt

ROOT = Path(__file__).parents[2]
HISTORIC = {
    "TRAINING_ORDER": 1,
    "TRAINING_FLIP": 2,
    "TRAINING_CAPTION": 3,
    "TRAINING_CAPTION_DROPOUT": 4,
    "TRAINING_TIMESTEP": 5,
    "TRAINING_NOISE": 6,
    "SAMPLER_START": 101,
    "SAMPLER_STEP": 102,
    "GRID_NOISE": 201,
    "SAMPLED_LOSS_NOISE": 202,
    "SAMPLED_LOSS_TIMESTEP": 203,
    "SAMPLED_LOSS_CAPTION": 204,
    "FISHER_TIMESTEP": 301,
    "FISHER_CAPTION": 302,
    "FISHER_NOISE": 303,
    "TRAINING_SAMPLE": 301,
    "QUERY_TIMESTEP": 401,
    "QUERY_GRADIENT_NOISE": 402,
    "QUERY_VALUE_NOISE": 403,
    "PROJECTION_ROW": 502,
    "JOURNEY_NOISE": 601,
    "RANKER_QUERY_ORDER": 601,
    "RANKER_OUTSIDE_IMAGE": 602,
    "RANKER_SUBSAMPLE": 603,
    "RANKER_BLOCK": 604,
    "TEACHER_SPLIT": 611,
    "TEACHER_SUBSET": 612,
    "LOSS_EXCESS_NOISE": 702,
}


def test_the_historic_values_stay() -> None:
    now = {name: int(salt) for name, salt in Salt.__members__.items()}
    assert {name: now[name] for name in HISTORIC} == HISTORIC


def test_only_the_two_historic_values_are_given_twice() -> None:
    aliases = {name: salt.name for name, salt in Salt.__members__.items() if name != salt.name}
    assert aliases == HISTORIC_ALIASES
    assert set(aliases) <= set(HISTORIC), "a new salt needs a value of its own"


def test_a_salt_makes_the_key_of_its_number() -> None:
    ids = torch.tensor([3, -7])
    for salt in Salt:
        assert torch.equal(keyed_random.combine(salt, 5, ids), keyed_random.combine(int(salt), 5, ids))


def test_no_module_has_salts_of_its_own() -> None:
    """The first argument of `combine` is never a number, nor a name that a module gives a number."""
    found = []
    for folder in ("wherefrom", "lightning_modules", "datamodules", "callbacks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            numbers = {
                target.id
                for node in tree.body
                if isinstance(node, ast.Assign) and _holds_a_number(node.value)
                for name in node.targets
                for target in ast.walk(name)
                if isinstance(target, ast.Name)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "combine" and node.args:
                    first = node.args[0]
                    if isinstance(first, ast.Constant) or (isinstance(first, ast.Name) and first.id in numbers):
                        found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def _holds_a_number(value: ast.expr) -> bool:
    return any(isinstance(node, ast.Constant) and isinstance(node.value, int) for node in ast.walk(value))
