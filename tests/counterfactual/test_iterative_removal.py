"""Greedy removal: one round is all at once, and later rounds ask the models of the rounds before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.judging import Judge, quick_influence, rankings
from wherefrom.attributors import PixelSimilarity
from wherefrom.counterfactual.evaluate import judge as judge_by
from wherefrom.counterfactual.iterative_removal import check_greedy, remove_greedily
from wherefrom.counterfactual.protocol import Protocol
from wherefrom.counterfactual.removal import Removal, plan_removals
from wherefrom.counterfactual.report import write_judge_report
from wherefrom.counterfactual.retraining import Retrain

K = 2


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    methods = {"influence": quick_influence(), "pixel": PixelSimilarity()}
    return Judge(tmp_path_factory.mktemp("greedy"), methods, count=60)


def test_one_round_is_all_at_once(judge: Judge) -> None:
    first = rankings(judge.first())
    pool = tuple(query.id for query in judge.queries)
    at_once = plan_removals("influence", first["influence"], K, [pool], judge.data.images.ids)
    measured = judge.sweep.measure([Retrain(), Retrain(at_once[0].ids)])
    (result,) = remove_greedily(
        first, at_once=at_once, rounds=1, measured=measured, sweep=judge.sweep, again=judge.again, seeds=[0]
    )
    assert result.removals == at_once
    assert result.greedy.tolist() == result.at_once.tolist()
    assert result.difference.tolist() == [0.0, 0.0, 0.0]
    assert result.removed[0] == result.removed[1]


def test_each_round_takes_from_the_model_of_the_last(judge: Judge) -> None:
    first = rankings(judge.first())
    pool = tuple(query.id for query in judge.queries)
    at_once = plan_removals("influence", first["influence"], K, [pool], judge.data.images.ids)
    measured = judge.sweep.measure([Retrain(ids, seed) for seed in (0, 1) for ids in ((), at_once[0].ids)])
    (result,) = remove_greedily(
        first, at_once=at_once, rounds=2, measured=measured, sweep=judge.sweep, again=judge.again, seeds=[0, 1]
    )
    gone = {name for query in pool for name in first["influence"][query][:1]}
    halfway = tuple(sorted(gone))
    left = judge.again("influence", Retrain(halfway, 0), pool)
    gone |= {name for query in pool for name in left[query][:1]}
    (removal,) = result.removals
    assert set(removal.ids) == gone != set(at_once[0].ids)
    measured = judge.sweep.measure([Retrain(ids, s) for s in (0, 1) for ids in ((), removal.ids, at_once[0].ids)])
    for query, greedy, ordinary in zip(result.queries, result.greedy, result.at_once, strict=True):
        for ids, value in ((removal.ids, greedy), (at_once[0].ids, ordinary)):
            moved = [measured[Retrain(ids, s)][query].loss - measured[Retrain((), s)][query].loss for s in (0, 1)]
            assert value == pytest.approx(sum(moved) / 2)
    assert Retrain(halfway, 0) in judge.trained
    assert Retrain(halfway, 1) not in judge.trained, "between the rounds only the first seed is asked"
    stored = result.as_json()
    assert stored["pools"] == [{"queries": list(pool), "ids": list(removal.ids)}]
    assert stored["estimates"]["difference"][0] == pytest.approx(sum(result.greedy - result.at_once) / 3)


def test_the_judge_says_its_plan_and_goes_on_after_an_interruption(judge: Judge, tmp_path: Path) -> None:
    protocol, first = Protocol(ks=[K], pools=[3], random=0, after=1, groups=True, greedy=2), judge.first()
    judge.said.clear()
    judge.stop_at = "greedy removal, round 2 of 2: 1 pools, 1 seeds"
    with pytest.raises(KeyboardInterrupt):
        judge_by(tmp_path, rankings=first, sweep=judge.sweep, protocol=protocol, again=judge.again)
    early = json.loads((tmp_path / "counterfactual.json").read_text())
    judge.stop_at = None
    judge_by(tmp_path, rankings=first, sweep=judge.sweep, protocol=protocol, again=judge.again)
    assert len(set(judge.trained)) == len(judge.trained), "trained twice"
    after, plan, models = judge.said[:3]
    assert after == "after the models, 6 queries are attributed again, in 2 runs"
    assert "greedy removal in 2 rounds: up to 2 further models, 1 for each round" in plan
    assert "not for pixel: what asks no model" in plan
    assert models.startswith("7 models, "), "all images, and of two methods both halves and the whole"
    stored = json.loads((tmp_path / "counterfactual.json").read_text())
    assert early == {name: value for name, value in stored.items() if name not in ("greedy", "not_greedy")}
    assert [(each["method"], each["k"]) for each in stored["groups"]] == [("influence", K), ("pixel", K)]
    (greedy,) = stored["greedy"]
    assert (greedy["method"], greedy["rounds"], stored["not_greedy"]) == ("influence", 2, ["pixel"])
    (row,) = (each for each in stored["rows"] if each["method"] == "influence")
    assert greedy["at_once"] == stored["groups"][0]["both"] == row["loss"]["own"]
    assert [each["queries"] for each in stored["foresight"]] == [3, 3], "whole pools"
    assert all(each["foresight"]["spearman"] == 1.0 for each in stored["after"] if each["method"] == "pixel")
    assert {name for each in stored["after"] for name in (*each["before"], *each["after"])} == set(stored["shown"])
    page = write_judge_report(tmp_path)[0].read_text()
    for title in ("Do effects add up?", "In rounds, or all at once?", "Who replaced them?"):
        assert title in page


def test_rounds_that_could_take_too_much_are_refused_before_any_training(tmp_path: Path) -> None:
    judge = Judge(tmp_path, {"influence": quick_influence()}, count=50)
    first, *others = judge.first()["influence"]
    alike = {"influence": [first, *(replace(each, scores=first.scores) for each in others)]}
    judge.trained.clear()
    with pytest.raises(ValueError, match="could leave out 6 of 50 images for a pool of 3 queries and K 2, more than"):
        judge_by(
            tmp_path / "judged",
            rankings=alike,
            sweep=judge.sweep,
            protocol=Protocol(ks=[2], pools=[3], greedy=2),
            again=judge.again,
        )
    assert judge.trained == []
    pool, ids = tuple(query.id for query in judge.queries), judge.data.images.ids
    check_greedy([Removal("influence", 2, pool[:2], ids[:2]), Removal("influence", 6, pool[:1], ids[:6])], len(ids))


def test_attributing_again_needs_to_be_told_how(judge: Judge, tmp_path: Path) -> None:
    for settings in ({"after": 1}, {"greedy": 1}):
        with pytest.raises(ValueError, match="attribute again: give `again`"):
            judge_by(tmp_path, rankings={}, sweep=judge.sweep, protocol=Protocol(**settings))
