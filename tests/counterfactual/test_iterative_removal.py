"""IterativeRemoval removal: one round is all at once, and later rounds ask the models of the rounds before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.counterfactual import TinyEvaluation, quick_influence, rankings
from wherefrom.attributors import PixelSimilarity
from wherefrom.counterfactual.evaluate import evaluate_counterfactual
from wherefrom.counterfactual.iterative_removal import check_iterative_removal, remove_iteratively
from wherefrom.counterfactual.protocol import Protocol
from wherefrom.counterfactual.removal import Removal, plan_removals
from wherefrom.counterfactual.report import write_counterfactual_report
from wherefrom.counterfactual.retraining import RetrainingJob

K = 2
ADDED: dict[str, Any] = {"reattributed_queries": 1, "additivity_groups": True, "iterative_removal_rounds": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEvaluation:
    methods = {"influence": quick_influence(), "pixel": PixelSimilarity()}
    return TinyEvaluation(tmp_path_factory.mktemp("iterative"), methods, count=60)


def test_one_round_is_all_at_once(tiny: TinyEvaluation) -> None:
    first = rankings(tiny.first())
    group = tuple(query.id for query in tiny.queries)
    at_once = plan_removals("influence", first["influence"], K, [group], tiny.data.images.ids)
    measured = tiny.sweep.measure([RetrainingJob(), RetrainingJob(at_once[0].ids)])
    (result,) = remove_iteratively(
        first,
        at_once=at_once,
        rounds=1,
        measured=measured,
        sweep=tiny.sweep,
        reattribution=tiny.reattribution,
        seeds=[0],
    )
    assert result.removals == at_once
    assert result.iterative.tolist() == result.at_once.tolist()
    assert result.difference.tolist() == [0.0, 0.0, 0.0]
    assert result.removed[0] == result.removed[1]


def test_each_round_takes_from_the_model_of_the_last(tiny: TinyEvaluation) -> None:
    first = rankings(tiny.first())
    group = tuple(query.id for query in tiny.queries)
    at_once = plan_removals("influence", first["influence"], K, [group], tiny.data.images.ids)
    measured = tiny.sweep.measure([RetrainingJob(ids, seed) for seed in (0, 1) for ids in ((), at_once[0].ids)])
    (result,) = remove_iteratively(
        first,
        at_once=at_once,
        rounds=2,
        measured=measured,
        sweep=tiny.sweep,
        reattribution=tiny.reattribution,
        seeds=[0, 1],
    )
    gone = {name for query in group for name in first["influence"][query][:1]}
    halfway = tuple(sorted(gone))
    left = tiny.reattribution("influence", RetrainingJob(halfway, 0), group)
    gone |= {name for query in group for name in left[query][:1]}
    (removal,) = result.removals
    assert set(removal.ids) == gone != set(at_once[0].ids)
    measured = tiny.sweep.measure([RetrainingJob(ids, s) for s in (0, 1) for ids in ((), removal.ids, at_once[0].ids)])
    for query, iterative, ordinary in zip(result.queries, result.iterative, result.at_once, strict=True):
        for ids, value in ((removal.ids, iterative), (at_once[0].ids, ordinary)):
            moved = [
                measured[RetrainingJob(ids, s)][query].loss - measured[RetrainingJob((), s)][query].loss for s in (0, 1)
            ]
            assert value == pytest.approx(sum(moved) / 2)
    assert RetrainingJob(halfway, 0) in tiny.trained
    assert RetrainingJob(halfway, 1) not in tiny.trained, "between the rounds only the first seed is asked"
    stored = result.as_json()
    assert stored["query_groups"] == [{"queries": list(group), "ids": list(removal.ids)}]
    assert stored["estimates"]["difference"][0] == pytest.approx(sum(result.iterative - result.at_once) / 3)


def test_the_evaluation_logs_its_plan_and_goes_on_after_an_interruption(tiny: TinyEvaluation, tmp_path: Path) -> None:
    protocol, first = Protocol(ks=[K], query_groups=[3], random=0, **ADDED), tiny.first()
    tiny.logged.clear()
    tiny.stop_at = "iterative removal, round 2 of 2: 1 query groups, 1 seeds"
    with pytest.raises(KeyboardInterrupt):
        evaluate_counterfactual(
            tmp_path, rankings=first, sweep=tiny.sweep, protocol=protocol, reattribution=tiny.reattribution
        )
    early = json.loads((tmp_path / "counterfactual.json").read_text())
    tiny.stop_at = None
    evaluate_counterfactual(
        tmp_path, rankings=first, sweep=tiny.sweep, protocol=protocol, reattribution=tiny.reattribution
    )
    assert len(set(tiny.trained)) == len(tiny.trained), "trained twice"
    after, plan, models = tiny.logged[:3]
    assert after == "after the models, 6 queries are attributed again, in 2 runs"
    assert "iterative removal in 2 rounds: up to 2 further models, 1 for each round" in plan
    assert "not for pixel: a method without a model" in plan
    assert models.startswith("7 models, "), "all images, and of two methods both halves and the whole"
    stored = json.loads((tmp_path / "counterfactual.json").read_text())
    assert early == {
        name: value for name, value in stored.items() if name not in ("iterative_removal", "without_iterative_removal")
    }
    assert [(each["method"], each["k"]) for each in stored["additivity"]] == [("influence", K), ("pixel", K)]
    (iterative,) = stored["iterative_removal"]
    assert (iterative["method"], iterative["rounds"], stored["without_iterative_removal"]) == (
        "influence",
        2,
        ["pixel"],
    )
    (row,) = (each for each in stored["rows"] if each["method"] == "influence")
    assert iterative["at_once"] == stored["additivity"][0]["both"] == row["loss"]["matched"]
    assert [each["queries"] for each in stored["replacement_prediction"]] == [3, 3], "whole query groups"
    assert all(each["prediction"]["spearman"] == 1.0 for each in stored["reattribution"] if each["method"] == "pixel")
    assert {name for each in stored["reattribution"] for name in (*each["before"], *each["after"])} == set(
        stored["captions"]
    )
    page = write_counterfactual_report(tmp_path)[0].read_text()
    for title in ("do effects add up?", "in rounds, or all at once?", "which images take over?"):
        assert title in page


def test_rounds_that_could_take_too_much_are_refused_before_any_training(tmp_path: Path) -> None:
    tiny = TinyEvaluation(tmp_path, {"influence": quick_influence()}, count=50)
    first, *others = tiny.first()["influence"]
    alike = {"influence": [first, *(replace(each, scores=first.scores) for each in others)]}
    tiny.trained.clear()
    with pytest.raises(ValueError, match="could leave out 6 of 50 images for a group of 3 queries and K 2, more than"):
        evaluate_counterfactual(
            tmp_path / "judged",
            rankings=alike,
            sweep=tiny.sweep,
            protocol=Protocol(ks=[2], query_groups=[3], iterative_removal_rounds=2),
            reattribution=tiny.reattribution,
        )
    assert tiny.trained == []
    group, ids = tuple(query.id for query in tiny.queries), tiny.data.images.ids
    check_iterative_removal(
        [Removal("influence", 2, group[:2], ids[:2]), Removal("influence", 6, group[:1], ids[:6])], len(ids)
    )


def test_attributing_again_needs_to_be_told_how(tiny: TinyEvaluation, tmp_path: Path) -> None:
    for settings in ({"reattributed_queries": 1}, {"iterative_removal_rounds": 1}):
        with pytest.raises(ValueError, match="attribute again: give `reattribution`"):
            evaluate_counterfactual(tmp_path, rankings={}, sweep=tiny.sweep, protocol=Protocol(**settings))
