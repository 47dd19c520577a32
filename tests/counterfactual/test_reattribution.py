"""Who replaces what was removed: run folders that resume and refuse, and numbers of real rankings."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.judging import Judge, quick_influence, rankings
from tests.support.tiny import one_process
from wherefrom.attributors import PixelSimilarity, Random
from wherefrom.counterfactual.reattribution import after_plan, covering, foreseen, replacements, shown_file, write_shown
from wherefrom.counterfactual.removal import Removal
from wherefrom.counterfactual.replacement_prediction import foresight
from wherefrom.counterfactual.retraining import Retrain
from wherefrom.runtime.artifacts import ArtifactMismatchError
from wherefrom.runtime.measured_cost import Cost


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    methods = {"influence": quick_influence(), "pixel": PixelSimilarity()}
    return Judge(tmp_path_factory.mktemp("again"), methods)


def test_nothing_removed_gives_the_first_ranking(judge: Judge) -> None:
    first = rankings(judge.first())
    for method in judge.methods:
        names = [query.id for query in judge.queries]
        assert judge.again(method, Retrain(), names) == first[method]
        removal = Removal(method, 3, tuple(names), ())
        for result in replacements(first[method], [removal], judge.again, seed=0):
            assert (result.foresight.spearman, result.foresight.share, result.foresight.chance) == (1.0, 1.0, 3 / 12)
            assert result.before == result.after == first[method][result.query][:5]
            assert result.removed == []


def test_what_is_left_is_ranked_as_by_a_method_fitted_by_hand(judge: Judge) -> None:
    first, query = rankings(judge.first()), judge.queries[1]
    retrain = Retrain(tuple(sorted(first["influence"][query.id][:4])))
    result = judge.again("influence", retrain, [query.id])
    method, left = quick_influence(), judge.again.left(retrain)
    assert left.latents is not None
    assert set(left.images.ids) == set(left.latents.ids) == set(judge.data.images.ids) - set(retrain.exclude)
    method.fit(left, judge.retrains.model(retrain), judge.store, one_process())
    (scores,) = method.score([query])
    assert result[query.id] == [name for name, _ in scores.top(8)]
    assert result[query.id] != [name for name in first["influence"][query.id] if name not in retrain.exclude]
    (replacement,) = replacements(
        first["influence"], [Removal("influence", 4, (query.id,), retrain.exclude)], judge.again, seed=0
    )
    assert replacement.removed == first["influence"][query.id][:4]
    assert replacement.before[4] not in retrain.exclude
    assert replacement.after == result[query.id][:5]
    assert replacement.foresight == foresight(first["influence"][query.id], retrain.exclude, result[query.id], 4)
    assert replacement.model == judge.retrains.name(retrain)


def test_the_control_is_what_another_seed_says_of_what_is_left(judge: Judge) -> None:
    first, query = rankings(judge.first()), judge.queries[2].id
    for method, same in (("influence", False), ("pixel", True)):
        gone = tuple(sorted(first[method][query][:3]))
        removal = Removal(method, 3, (query,), gone)
        (without,) = replacements(first[method], [removal], judge.again, seed=0)
        (result,) = replacements(first[method], [removal], judge.again, seed=0, control=1)
        assert without.control is None
        assert result.foresight == without.foresight
        left = [name for name in judge.again(method, Retrain((), 1), [query])[query] if name not in gone]
        assert result.control == foresight(first[method][query], gone, left, 3)
        assert (result.control.spearman == 1.0) == same, "pixels ask no model"
        stored = foreseen([result])
        assert (stored["control_spearman"][0], stored["control_share"][0]) == pytest.approx(
            (result.control.spearman, result.control.share)
        )
        assert result.as_json()["control"]["spearman"] == result.control.spearman
        assert "control_spearman" not in foreseen([without])


def test_pixels_rank_what_is_left_as_before(judge: Judge) -> None:
    first, query = rankings(judge.first())["pixel"], judge.queries[0].id
    retrain = Retrain(tuple(first[query][:3]))
    assert judge.again("pixel", retrain, [query])[query] == first[query][3:]
    assert not judge.again.asks_model("pixel")
    assert judge.again.asks_model("influence")


def test_a_finished_run_needs_no_weights_and_another_one_is_refused(judge: Judge) -> None:
    retrain, names = Retrain(judge.data.images.ids[:1]), [query.id for query in judge.queries[:2]]
    result = judge.again("influence", retrain, names)
    shutil.rmtree(judge.store.path("retrain", judge.retrains.identity(retrain)))
    before = len(judge.trained)
    assert judge.again("influence", retrain, names[::-1]) == result, "the order of the queries does not matter"
    assert len(judge.trained) == before, "trained again"
    method = judge.methods["influence"]
    judge.methods["influence"] = Random()
    with pytest.raises(ArtifactMismatchError, match="was made with other settings"):
        judge.again("influence", retrain, names)
    judge.methods["influence"] = method


def test_two_pools_that_name_the_same_images_have_folders_of_their_own(judge: Judge) -> None:
    retrain, (first, second, _) = Retrain(judge.data.images.ids[:2]), [query.id for query in judge.queries]
    one = judge.again("pixel", retrain, [first])
    other = judge.again("pixel", retrain, [second])
    assert set(one) == {first}
    assert set(other) == {second}
    assert judge.again("pixel", retrain, [first]) == one
    folders = sorted(path.name for path in (judge.folder / "after" / judge.retrains.name(retrain)).iterdir())
    assert len(folders) == 2
    assert folders[0] == "pixel"


def test_whole_pools_are_taken_until_enough_queries_are_covered() -> None:
    removals = [Removal("m", 1, queries, ()) for queries in (("a", "b"), ("c", "d"), ("e",))]
    for count, pools in ((0, 0), (1, 1), (2, 1), (3, 2), (5, 3), (9, 3)):
        assert covering(removals, count) == removals[:pools]


def test_the_plan_says_what_the_first_attributions_took() -> None:
    removals = [
        Removal(method, 1, queries, ()) for method, queries in (("m", ("a", "b")), ("m", ("c",)), ("n", ("a",)))
    ]
    said = after_plan(removals, {"m": Cost(40.0, 0, 0)})
    assert said.startswith("after the models, 4 queries are attributed again, in 3 runs (about 2 min")
    larger = [Removal("m", 2, ("a", "b"), ())]
    said = after_plan([*removals, *larger], {}, control=True)
    assert said == "after the models, 10 queries are attributed again, in 7 runs", "one control for both K"


def test_means_are_over_the_queries(judge: Judge) -> None:
    first = rankings(judge.first())["influence"]
    names = tuple(query.id for query in judge.queries)
    removal = Removal("influence", 2, names, tuple(sorted({name for query in names for name in first[query][:2]})))
    result = replacements(first, [removal], judge.again, seed=0)
    stored = foreseen(result)
    assert (stored["method"], stored["k"], stored["queries"]) == ("influence", 2, 3)
    values = [each.foresight.spearman for each in result]
    assert stored["spearman"] == pytest.approx([np.mean(values), np.std(values, ddof=1) / 3**0.5])
    assert stored["chance"][0] == pytest.approx(2 / (12 - len(removal.ids)))


def test_images_are_kept_for_the_page(judge: Judge, tmp_path: Path) -> None:
    ids = judge.data.images.ids
    captions = write_shown(tmp_path, judge.data.images, [ids[3], ids[1], ids[3]])
    assert captions == {name: judge.data.images.captions[ids.index(name)][0] for name in (ids[1], ids[3])}
    with Image.open(shown_file(tmp_path, ids[3])) as opened:
        assert np.array_equal(np.asarray(opened), judge.data.images.pixels[3])
