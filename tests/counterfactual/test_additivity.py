"""Additivity of the halves of what a method names, from hand-made measurements."""

from __future__ import annotations

import numpy as np
import pytest

from wherefrom.counterfactual.additivity import halve_removals, measure_additivity
from wherefrom.counterfactual.effects import Measured
from wherefrom.counterfactual.query_panel import Measurement
from wherefrom.counterfactual.removal import Removal, plan_removals
from wherefrom.counterfactual.retraining import RetrainingJob

TRAINING = [f"p{index:02d}" for index in range(100)]
RANKINGS = {"q": TRAINING[:5], "r": TRAINING[5:10], "s": TRAINING[10:15]}
GROUPS = [("q", "r"), ("s",)]


def measured(losses: dict[tuple[tuple[str, ...], int], dict[str, float]]) -> Measured:
    nothing = np.zeros(1, np.float16)
    return {
        RetrainingJob(ids, seed): {query: Measurement(loss, nothing, 0.0) for query, loss in by_query.items()}
        for (ids, seed), by_query in losses.items()
    }


def test_odd_and_even_places_go_to_the_halves() -> None:
    both = plan_removals("m", RANKINGS, 5, GROUPS, TRAINING)
    result = halve_removals(both, RANKINGS, TRAINING)
    assert result.both == both
    assert [each.ids for each in result.first] == [("p00", "p02", "p04", "p05", "p07", "p09"), ("p10", "p12", "p14")]
    assert [each.ids for each in result.second] == [("p01", "p03", "p06", "p08"), ("p11", "p13")]
    for group, first, second in zip(result.both, result.first, result.second, strict=True):
        assert group.queries == first.queries == second.queries
        assert tuple(sorted(first.ids + second.ids)) == group.ids


def test_the_deviation_is_what_both_do_beyond_the_sum() -> None:
    collected = halve_removals(plan_removals("m", RANKINGS, 2, GROUPS, TRAINING), RANKINGS, TRAINING)
    base = {"q": 1.0, "r": 2.0, "s": 3.0}
    losses = {}
    for seed, size in ((0, 1.0), (1, 3.0)):
        losses[(), seed] = base
        # Of each removal only the queries of its own group count: the others are moved by 100.
        for removals, change in (
            (collected.first, {"q": 0.1, "r": 0.2, "s": 0.3}),
            (collected.second, {"q": 0.4, "r": 0.0, "s": -0.1}),
            (collected.both, {"q": 0.9, "r": 0.1, "s": 0.2}),
        ):
            for removal in removals:
                mine = {q: base[q] + size * change[q] if q in removal.queries else 100.0 for q in base}
                losses[removal.ids, seed] = mine
    result = measure_additivity(collected, measured(losses), [0, 1])
    assert result.queries == ("q", "r", "s")
    assert result.first == pytest.approx([0.2, 0.4, 0.6]), "the mean over the seeds"
    assert result.second == pytest.approx([0.8, 0.0, -0.2])
    assert result.both == pytest.approx([1.8, 0.2, 0.4])
    assert result.deviation == pytest.approx([0.8, -0.2, 0.0])
    stored = result.as_json()
    assert (stored["method"], stored["k"]) == ("m", 2)
    assert stored["deviation"] == pytest.approx([0.8, -0.2, 0.0])
    assert stored["estimates"]["deviation"] == pytest.approx([0.2, np.std([0.8, -0.2, 0.0], ddof=1) / 3**0.5])
    assert stored["estimates"]["both"][0] == pytest.approx(0.8)


def test_one_image_has_no_halves() -> None:
    with pytest.raises(ValueError, match="K must be at least 2"):
        halve_removals([Removal("m", 1, ("q",), ("p00",))], RANKINGS, TRAINING)
