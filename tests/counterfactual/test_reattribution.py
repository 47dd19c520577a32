"""Re-attribution and replacements: run folders that resume and refuse, and numbers of real rankings."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.counterfactual import TinyEvaluation, quick_influence, rankings
from tests.support.tiny import one_process
from wherefrom.attributors import PixelSimilarity, Random
from wherefrom.counterfactual.reattribution import _with_ties_by_hash
from wherefrom.counterfactual.removal import Removal
from wherefrom.counterfactual.replacement_prediction import evaluate_replacement_prediction
from wherefrom.counterfactual.replacements import (
    covering,
    describe_reattribution,
    find_replacements,
    mean_replacement_prediction,
    shown_file,
    write_shown,
)
from wherefrom.counterfactual.retraining import RetrainingJob
from wherefrom.runtime.artifacts import ArtifactMismatchError
from wherefrom.runtime.measured_cost import Cost


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEvaluation:
    methods = {"influence": quick_influence(), "pixel": PixelSimilarity()}
    return TinyEvaluation(tmp_path_factory.mktemp("reattribution"), methods)


def test_nothing_removed_gives_the_first_ranking(tiny: TinyEvaluation) -> None:
    first = rankings(tiny.first())
    for method in tiny.methods:
        names = [query.id for query in tiny.queries]
        assert tiny.reattribution(method, RetrainingJob(), names) == first[method]
        removal = Removal(method, 3, tuple(names), ())
        for result in find_replacements(first[method], [removal], tiny.reattribution, seed=0):
            assert (
                result.prediction.spearman,
                result.prediction.share,
                result.prediction.chance,
            ) == (1.0, 1.0, 3 / 12)
            assert result.before == result.after == first[method][result.query][:5]
            assert result.removed == []


def test_equal_scores_before_and_after_do_not_agree_by_their_names(tiny: TinyEvaluation) -> None:
    ids = [f"{index:03d}" for index in range(200)]
    assert _with_ties_by_hash(ids, np.arange(200.0)) == ids[::-1]
    after = _with_ties_by_hash(ids, np.zeros(200))
    assert _with_ties_by_hash(ids[::-1], np.zeros(200)) == after
    assert abs(evaluate_replacement_prediction(ids, (), after, 20).spearman) < 0.25


def test_what_is_left_is_ranked_as_by_a_method_fitted_by_hand(tiny: TinyEvaluation) -> None:
    first, query = rankings(tiny.first()), tiny.queries[1]
    job = RetrainingJob(tuple(sorted(first["influence"][query.id][:4])))
    result = tiny.reattribution("influence", job, [query.id])
    method, left = quick_influence(), tiny.reattribution.remaining(job)
    assert left.latents is not None
    assert set(left.images.ids) == set(left.latents.ids) == set(tiny.data.images.ids) - set(job.exclude)
    method.fit(left, tiny.models.model(job), tiny.store, one_process())
    (scores,) = method.score([query])
    assert result[query.id] == [name for name, _ in scores.top(8)]
    assert result[query.id] != [name for name in first["influence"][query.id] if name not in job.exclude]
    (replacement,) = find_replacements(
        first["influence"], [Removal("influence", 4, (query.id,), job.exclude)], tiny.reattribution, seed=0
    )
    assert replacement.removed == first["influence"][query.id][:4]
    assert replacement.before[4] not in job.exclude
    assert replacement.after == result[query.id][:5]
    assert replacement.prediction == evaluate_replacement_prediction(
        first["influence"][query.id], job.exclude, result[query.id], 4
    )
    assert replacement.model == tiny.models.name(job)


def test_the_control_is_what_another_seed_says_of_what_is_left(tiny: TinyEvaluation) -> None:
    first, query = rankings(tiny.first()), tiny.queries[2].id
    for method, same in (("influence", False), ("pixel", True)):
        gone = tuple(sorted(first[method][query][:3]))
        removal = Removal(method, 3, (query,), gone)
        (without,) = find_replacements(first[method], [removal], tiny.reattribution, seed=0)
        (result,) = find_replacements(first[method], [removal], tiny.reattribution, seed=0, control=1)
        assert without.control is None
        assert result.prediction == without.prediction
        left = [name for name in tiny.reattribution(method, RetrainingJob((), 1), [query])[query] if name not in gone]
        assert result.control == evaluate_replacement_prediction(first[method][query], gone, left, 3)
        assert (result.control.spearman == 1.0) == same, "pixels use no model"
        stored = mean_replacement_prediction([result])
        assert (stored["control_spearman"][0], stored["control_share"][0]) == pytest.approx(
            (result.control.spearman, result.control.share)
        )
        assert result.as_json()["control"]["spearman"] == result.control.spearman
        assert "control_spearman" not in mean_replacement_prediction([without])


def test_pixels_rank_what_is_left_as_before(tiny: TinyEvaluation) -> None:
    first, query = rankings(tiny.first())["pixel"], tiny.queries[0].id
    job = RetrainingJob(tuple(first[query][:3]))
    assert tiny.reattribution("pixel", job, [query])[query] == first[query][3:]
    assert not tiny.reattribution.uses_model("pixel")
    assert tiny.reattribution.uses_model("influence")


def test_a_finished_run_needs_no_weights_and_another_one_is_refused(tiny: TinyEvaluation) -> None:
    job, names = RetrainingJob(tiny.data.images.ids[:1]), [query.id for query in tiny.queries[:2]]
    result = tiny.reattribution("influence", job, names)
    shutil.rmtree(tiny.store.path("retrain", tiny.models.identity(job)))
    before = len(tiny.trained)
    assert tiny.reattribution("influence", job, names[::-1]) == result, "the order of the queries does not matter"
    assert len(tiny.trained) == before, "trained again"
    method = tiny.methods["influence"]
    tiny.methods["influence"] = Random()
    with pytest.raises(ArtifactMismatchError, match="was made with other settings"):
        tiny.reattribution("influence", job, names)
    tiny.methods["influence"] = method


def test_two_query_groups_that_name_the_same_images_have_folders_of_their_own(tiny: TinyEvaluation) -> None:
    job, (first, second, _) = RetrainingJob(tiny.data.images.ids[:2]), [query.id for query in tiny.queries]
    one = tiny.reattribution("pixel", job, [first])
    other = tiny.reattribution("pixel", job, [second])
    assert set(one) == {first}
    assert set(other) == {second}
    assert tiny.reattribution("pixel", job, [first]) == one
    folders = sorted(path.name for path in (tiny.folder / "reattribution" / tiny.models.name(job)).iterdir())
    assert len(folders) == 2
    assert folders[0] == "pixel"


def test_whole_query_groups_are_taken_until_enough_queries_are_covered() -> None:
    removals = [Removal("m", 1, queries, ()) for queries in (("a", "b"), ("c", "d"), ("e",))]
    for count, groups in ((0, 0), (1, 1), (2, 1), (3, 2), (5, 3), (9, 3)):
        assert covering(removals, count) == removals[:groups]


def test_the_plan_says_what_the_first_attributions_took() -> None:
    removals = [
        Removal(method, 1, queries, ()) for method, queries in (("m", ("a", "b")), ("m", ("c",)), ("n", ("a",)))
    ]
    line = describe_reattribution(removals, {"m": Cost(40.0, 0, 0)})
    assert line.startswith("after the models, 4 queries are attributed again, in 3 runs (about 2 min")
    larger = [Removal("m", 2, ("a", "b"), ())]
    line = describe_reattribution([*removals, *larger], {}, control=True)
    assert line == "after the models, 10 queries are attributed again, in 7 runs", "one control for both K"


def test_means_are_over_the_queries(tiny: TinyEvaluation) -> None:
    first = rankings(tiny.first())["influence"]
    names = tuple(query.id for query in tiny.queries)
    removal = Removal("influence", 2, names, tuple(sorted({name for query in names for name in first[query][:2]})))
    result = find_replacements(first, [removal], tiny.reattribution, seed=0)
    stored = mean_replacement_prediction(result)
    assert (stored["method"], stored["k"], stored["queries"]) == ("influence", 2, 3)
    values = [each.prediction.spearman for each in result]
    assert stored["spearman"] == pytest.approx([np.mean(values), np.std(values, ddof=1) / 3**0.5])
    assert stored["chance"][0] == pytest.approx(2 / (12 - len(removal.ids)))


def test_images_are_kept_for_the_page(tiny: TinyEvaluation, tmp_path: Path) -> None:
    ids = tiny.data.images.ids
    captions = write_shown(tmp_path, tiny.data.images, [ids[3], ids[1], ids[3]])
    assert captions == {name: tiny.data.images.captions[ids.index(name)][0] for name in (ids[1], ids[3])}
    with Image.open(shown_file(tmp_path, ids[3])) as opened:
        assert np.array_equal(np.asarray(opened), tiny.data.images.pixels[3])
