"""A teacher set of several is the one that an ensemble of the teachers would have made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.ensemble_teacher import ensemble, main
from tests.support.planted import planted_teacher
from wherefrom.attributors import Attributor, Scores
from wherefrom.attributors.rank_ensemble import RankEnsemble
from wherefrom.distillation.teacher_set import TeacherSet, read_teacher_set, write_teacher_set
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import Query, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner


class Kept(Attributor):
    """Gives the scores of a teacher set."""

    def __init__(self, teacher: TeacherSet) -> None:
        self.teacher = teacher

    def identity(self) -> dict[str, Any]:
        return dict(self.teacher.identity)

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        pass

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        assert candidates is not None
        for query in queries:
            place = self.teacher.queries.index(query.id)
            by_id = dict(
                zip(
                    (self.teacher.images[row] for row in self.teacher.rows[place]),
                    self.teacher.scores[place].astype(np.float64),
                    strict=True,
                )
            )
            yield Scores(query, tuple(candidates), np.array([by_id[name] for name in candidates]), np.zeros(0))


def teachers() -> list[TeacherSet]:
    """The first scored 12 of 30 images, the others all, by other embeddings."""
    first = planted_teacher(scored=12)
    others = [planted_teacher(seed=seed) for seed in (1, 2)]
    return [first, *(replace(other, features={}) for other in others)]


def test_it_is_what_the_ensemble_of_the_teachers_says() -> None:
    sets = teachers()
    result = ensemble(sets)
    method = RankEnsemble([Kept(each) for each in sets])
    for place, name in enumerate(result.queries):
        candidates = [result.images[row] for row in sets[0].rows[place]]
        query = Query(name, result.prompts[place], np.zeros((2, 2, 3), np.uint8))
        (expected,) = method.score([query], candidates)
        by_id = dict(zip(expected.ids, expected.scores, strict=True))
        assert sorted(result.rows[place]) == sorted(sets[0].rows[place])
        assert [by_id[result.images[row]] for row in result.rows[place]] == pytest.approx(
            result.scores[place], abs=1e-6
        )
        assert (np.diff(result.scores[place]) <= 0).all()


def test_a_set_with_itself_keeps_its_order() -> None:
    first = teachers()[0]
    assert (ensemble([first, first]).rows == first.rows).all()


def test_sets_are_read_and_written_with_the_features_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [str(tmp_path / str(number)) for number in range(3)]
    for folder, each in zip(folders, teachers(), strict=True):
        write_teacher_set(Path(folder), each)
    monkeypatch.setattr("sys.argv", ["ensemble_teacher", "--sets", *folders, "--output", str(tmp_path / "all")])
    main()
    result = read_teacher_set(tmp_path / "all")
    assert (result.rows == ensemble(teachers()).rows).all()
    assert set(result.features) == set(teachers()[0].features)
    assert result.identity["method"] == "rank ensemble"


def test_sets_that_do_not_fit_are_refused() -> None:
    first, whole, _ = teachers()
    with pytest.raises(ValueError, match="at least two teacher sets; given 1"):
        ensemble([first])
    with pytest.raises(ValueError, match="Set 2 is not of the training images and queries of the first"):
        ensemble([first, planted_teacher(queries=5)])
    with pytest.raises(ValueError, match=r"A set did not score 'picture/.*' for the query 'query/000'; the first did"):
        ensemble([whole, first])
