"""Teacher sets: what is scored, what is left on disk, and that neither blocks nor interruptions nor workers matter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
from tests.support.attribution import HELD_OUT, TRAIN, influence
from tests.support.tiny import attribution_config, one_process, text_folder, tiny_encoder, tiny_model
from wherefrom.attributors import (
    Attributor,
    CaptionSimilarity,
    PixelSimilarity,
    Random,
    RankEnsemble,
    Rerank,
    TrainingData,
)
from wherefrom.commands.curate import Captions, curate
from wherefrom.distillation.teacher_set import TeacherSet, read_teacher_set
from wherefrom.features.base import TextEncoder
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.sources import QuerySource, generate
from wherefrom.rankings.ranking_file import normalised_ranks
from wherefrom.runtime.artifacts import ArtifactMismatchError, Store

SOURCE, CAPTIONS = QuerySource(sampling_steps=2), Captions(count=5)


class Lengths(TextEncoder):
    """Counts a caption's letters and words."""

    def encode_texts(self, captions: Any) -> torch.Tensor:
        return torch.tensor([[len(each), len(each.split())] for each in captions], dtype=torch.float32)

    def identity(self) -> dict[str, Any]:
        return {"text": "lengths"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_model(encoder=tiny_encoder(tmp_path_factory.mktemp("text") / "encoder"))


@pytest.fixture(scope="module")
def data() -> TrainingData:
    # Captions of the tiny set repeat; a teacher set draws each once.
    images = replace(TRAIN.images, captions=tuple((f"caption {name}",) for name in TRAIN.ids))
    return TrainingData(images, TRAIN, HELD_OUT.images, HELD_OUT)


def made(folder: Path, model: DiffusionModel, data: TrainingData, **options: Any) -> TeacherSet:
    settings: dict[str, Any] = {
        "teacher": Random(),
        "captions": CAPTIONS,
        "features": {"lengths": Lengths()},
        "store": Store(folder.parent / "store"),
        "runner": one_process(),
        **options,
    }
    return curate(folder, data=data, model=model, source=SOURCE, shape=(4, 4, 4), **settings)


def test_it_holds_what_the_teacher_says(model: DiffusionModel, data: TrainingData, tmp_path: Path) -> None:
    result = made(tmp_path / "set", model, data, teacher=influence(), block_size=2)
    assert result.is_complete
    assert result.images == data.images.ids
    assert set(result.prompts) <= {several[0] for several in data.images.captions}
    queries = generate(
        model, prompts=result.prompts, seed=SOURCE.seed, shape=(4, 4, 4), sampling_steps=SOURCE.sampling_steps
    )
    assert result.queries == tuple(query.id for query in queries)
    teacher = influence()
    teacher.fit(data, model, Store(tmp_path / "other store"), one_process())
    for row, scores in enumerate(teacher.score(queries)):
        ranked = scores.top(len(scores.ids))
        assert [result.images[place] for place in result.rows[row]] == [name for name, _ in ranked]
        np.testing.assert_allclose(result.scores[row], [value for _, value in ranked], rtol=1e-5)
    both = result.features["lengths"]
    assert both.training.tolist() == [[len(text), len(text.split())] for text in result.captions]
    assert both.queries.tolist() == [[len(text), len(text.split())] for text in result.prompts]
    read = read_teacher_set(tmp_path / "set")
    assert (read.images, read.captions, read.queries, read.prompts) == (
        result.images,
        result.captions,
        result.queries,
        result.prompts,
    )
    assert np.array_equal(read.rows, result.rows)
    assert np.array_equal(read.scores, result.scores)
    assert read.identity["teacher"] == influence().identity()


def test_a_set_kept_without_features_gets_them_again(model: DiffusionModel, data: TrainingData, tmp_path: Path) -> None:
    result = made(tmp_path / "set", model, data, block_size=2)
    shutil.rmtree(tmp_path / "set" / "features")
    again = made(tmp_path / "set", model, data, block_size=2)
    assert np.array_equal(again.rows, result.rows)
    assert np.array_equal(again.scores, result.scores)
    for side in ("training", "queries"):
        assert np.array_equal(getattr(again.features["lengths"], side), getattr(result.features["lengths"], side))
        assert (tmp_path / "set" / "features" / f"lengths.{side}.npy").exists()


def test_only_candidates_are_scored(model: DiffusionModel, data: TrainingData, tmp_path: Path) -> None:
    near = {"nearest": PixelSimilarity(), "k": 4}
    result = made(tmp_path / "near", model, data, **near)
    assert result.rows.shape == (5, 4)
    queries = generate(
        model, prompts=result.prompts, seed=SOURCE.seed, shape=(4, 4, 4), sampling_steps=SOURCE.sampling_steps
    )
    pixels = PixelSimilarity()
    pixels.fit(data, None, Store(tmp_path / "s"), one_process())
    for row, scores in enumerate(pixels.score(queries)):
        assert {result.images[place] for place in result.rows[row]} == {name for name, _ in scores.top(4)}
    drawn = made(tmp_path / "drawn", model, data, **near, subsample=2)
    assert drawn.rows.shape == (5, 2)
    for few, all_of_them in zip(drawn.rows, result.rows, strict=True):
        assert set(few) < set(all_of_them)
        assert few.tolist() == [place for place in all_of_them if place in few], "in the teacher's order"


def test_blocks_and_interruptions_do_not_matter(model: DiffusionModel, data: TrainingData, tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", model, data, block_size=16)

    class StoppedError(Exception):
        pass

    def stop(message: str) -> None:
        if message.startswith("block 2"):
            raise StoppedError

    with pytest.raises(StoppedError):
        made(tmp_path / "set", model, data, block_size=1, log=stop)
    assert not (tmp_path / "set" / "manifest.json").exists()
    scored: list[str] = []

    class Watched(Random):
        def score(self, queries: Any, candidates: Any = None) -> Any:
            scored.extend(query.prompt for query in queries)
            yield from super().score(queries, candidates)

    result = made(tmp_path / "set", model, data, teacher=Watched(), block_size=1)
    assert len(scored) == 3, "two of five were finished before"
    assert np.array_equal(result.rows, whole.rows)
    assert result.queries == whole.queries
    again = made(tmp_path / "set", model, data, teacher=Watched(), block_size=1)
    assert len(scored) == 3
    assert np.array_equal(again.scores, whole.scores)
    with pytest.raises(ArtifactMismatchError, match="captions"):
        made(tmp_path / "set", model, data, captions=Captions(count=4), block_size=1)


def test_a_block_that_fails_keeps_the_others(model: DiffusionModel, data: TrainingData, tmp_path: Path) -> None:
    class Picky(Random):
        def score(self, queries: Any, candidates: Any = None) -> Any:
            if any(query.prompt == failing for query in queries):
                raise ValueError("not this one")
            yield from super().score(queries, candidates)

    failing = CAPTIONS.choose(data)[1]
    with pytest.raises(ValueError, match=r"1 of 5 blocks failed; the others are kept.*block 1: not this one"):
        made(tmp_path / "set", model, data, teacher=Picky(), block_size=1)
    failing = ""
    assert len(made(tmp_path / "set", model, data, teacher=Picky(), block_size=1).queries) == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray")
def test_workers_do_the_same(ray_cluster: None, tmp_path: Path) -> None:
    file = attribution_config(tmp_path, "curated")
    text = text_folder(tmp_path / "pipeline")
    pixel, caption = tmp_path / "pixel.yaml", "wherefrom.attributors.CaptionSimilarity"
    pixel.write_text("class_path: PixelSimilarity\n")
    encoder = {"class_path": "wherefrom.features.base.MiniLMEncoder", "init_args": {"model": str(text)}}
    config = evaluate.parser().parse_args(["attribute", "-c", str(file)])
    settings = [
        *("--model", config.attribute.model, "--data", "ImageFolder"),
        *("--data.init_args.folder", str(tmp_path / "pictures"), "--store", str(tmp_path / "store")),
        *("--queries.sampling_steps", "2", "--captions.count", "5", "--block_size", "2"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--k", "6", "--nearest", str(pixel)),
        *("--teacher", caption, "--teacher.init_args.encoder", json.dumps(encoder)),
        *("--features", json.dumps({"text": encoder})),
    ]
    evaluate.main(["curate", *settings, "--output", str(tmp_path / "here")])
    evaluate.main(["curate", *settings, "--output", str(tmp_path / "ray"), "--workers.engine", "ray"])
    here, there = read_teacher_set(tmp_path / "here"), read_teacher_set(tmp_path / "ray")
    assert here.rows.shape == (5, 6)
    assert np.array_equal(here.rows, there.rows)
    assert here.queries == there.queries
    assert np.array_equal(here.features["text"].queries, there.features["text"].queries)
    with pytest.raises(ValueError, match="draws its queries from captions"):
        evaluate.main(["curate", *settings, "--output", str(tmp_path / "x"), "--queries.prompts", '["a"]'])


def test_captions_are_chosen_once_each_and_test_sets_skip_what_training_took(data: TrainingData) -> None:
    first, rest = Captions(count=4).choose(data), Captions(count=3, skip=4).choose(data)
    assert len({*first, *rest}) == 7
    assert Captions(count=7).choose(data) == [*first, *rest]
    assert Captions(count=7, seed=1).choose(data) != [*first, *rest]
    held_out = Captions(count=1, of="held_out").choose(data)
    assert data.held_out is not None
    assert held_out[0] in {several[0] for several in data.held_out.captions}
    with pytest.raises(ValueError, match="more than the 9 different captions of the training images"):
        Captions(count=6, skip=4).choose(data)
    with pytest.raises(ValueError, match="no held-out images"):
        Captions(of="held_out").choose(TrainingData(data.images))
    for settings in ({"count": 0}, {"skip": -1}, {"of": "web"}):
        with pytest.raises(ValueError, match=r"captions\."):
            Captions(**settings)  # type: ignore[arg-type]


def test_settings_that_do_not_fit_together(model: DiffusionModel, data: TrainingData, tmp_path: Path) -> None:
    for options in ({"k": 3}, {"nearest": PixelSimilarity()}, {"subsample": 2}):
        with pytest.raises(ValueError, match="Give both nearest and k"):
            made(tmp_path / "set", model, data, **options)
    with pytest.raises(ValueError, match="block_size must be positive; given 0"):
        made(tmp_path / "set", model, data, block_size=0)
    with pytest.raises(ValueError, match="between 1 and k, which is 3; given 4"):
        Rerank(Random(), PixelSimilarity(), 3, subsample=4)


def test_an_ensemble_averages_ranks(model: DiffusionModel, data: TrainingData, tmp_path: Path) -> None:
    text = CaptionSimilarity(Lengths())
    members: list[Attributor] = [Random(), PixelSimilarity(), text]
    queries = [*generate(model, prompts=["caption a", "b"], seed=0, shape=(4, 4, 4), sampling_steps=2)]
    ensemble = RankEnsemble(members)
    ensemble.fit(data, None, Store(tmp_path), one_process())
    for query, result in zip(queries, ensemble.score(queries), strict=True):
        singles = [next(iter(member.score([query]))) for member in members]
        expected = -np.mean([normalised_ranks(each.ids, each.scores) for each in singles], axis=0)
        np.testing.assert_allclose(result.scores, expected)
        assert result.null.shape == (len(HELD_OUT),)
        best = [sum(theirs.null[0] < theirs.scores) / len(theirs.scores) for theirs in singles]
        np.testing.assert_allclose(result.null[0], -np.mean(best))
    assert ensemble.requires == {"features", "prompt"}
    with pytest.raises(ValueError, match="at least two methods; given 1"):
        RankEnsemble([Random()])
