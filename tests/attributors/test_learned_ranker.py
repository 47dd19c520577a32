"""The learned ranker as an attributor: its scores, its index, and the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import evaluate
from tests.support.tiny import attribution_config, one_process, tiny_clip, tiny_ranker
from wherefrom.attributors import Attributor, LearnedRanker, Query, Random, RankEnsemble, Rerank, Scores, TrainingData
from wherefrom.commands.attribute import attribute
from wherefrom.data.image_set import ImageSet
from wherefrom.distillation.calibration import calibrate_ranker, load_calibration
from wherefrom.distillation.ranker import Ranker, save_ranker
from wherefrom.distillation.teacher_set import Features, TeacherSet, write_teacher_set
from wherefrom.features.base import ImageEncoder, TextEncoder
from wherefrom.metrics.concentration import concentration
from wherefrom.queries.regions import Region
from wherefrom.runtime.artifacts import ArtifactMismatchError, Store

COUNT = 30


class Colours(ImageEncoder):
    """Mean colour, centred."""

    def encode_images(self, pixels) -> Tensor:
        return torch.from_numpy(np.asarray(pixels, dtype=np.float32).mean((1, 2)) / 128 - 1)

    def identity(self):
        return {"image_encoder": "colours"}


class Lengths(TextEncoder):
    """How long a caption is, in letters and words."""

    def encode_texts(self, captions) -> Tensor:
        return torch.tensor([[len(text) / 10, len(text.split()) / 2] for text in captions])

    def identity(self):
        return {"text_encoder": "lengths"}


def images(count: int = COUNT, seed: int = 0) -> ImageSet:
    random = np.random.default_rng(seed)
    captions = [("a " * int(number), "never read") for number in random.integers(1, 9, count)]
    pixels = random.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    # Far apart in colour: the mean of noise would be grey everywhere.
    pixels = (pixels * random.uniform(0, 1, (count, 1, 1, 3))).astype(np.uint8)
    columns = {"license": tuple(f"licence {index}" for index in range(count))}
    return ImageSet(tuple(f"{index:03d}" for index in range(count)), tuple(captions), pixels, columns, f"p{seed}")


def queries(count: int = 3) -> list[Query]:
    drawn = images(count, seed=5)
    return [Query(f"q{index}", drawn.captions[index][0], drawn.pixels[index]) for index in range(count)]


def fast(folder: Path, scale: float = -2.0, **settings) -> LearnedRanker:
    ranker = tiny_ranker(folder / "ranker", {"lengths": 2, "colours": 3}, scale)
    return LearnedRanker(str(ranker), encoders={"colours": Colours(), "lengths": Lengths()}, **settings)


def fitted(folder: Path, held_out: ImageSet | None = None, **settings) -> LearnedRanker:
    method = fast(folder, **settings)
    method.fit(TrainingData(images(), held_out=held_out), None, Store(folder / "store"), one_process())
    return method


def brute_force(method: LearnedRanker, query: Query, training: ImageSet) -> np.ndarray:
    """Cosines from the ranker's weights in float64; features in the order of its manifest, of the first caption."""
    ranker = Ranker(**method.ranker.sizes).double().eval()
    ranker.load_state_dict(method.ranker.state_dict())

    def embedded(texts, pixels) -> Tensor:
        return ranker.mlp(torch.cat([Lengths().encode_texts(texts), Colours().encode_images(pixels)], 1).double())

    with torch.no_grad():
        images = embedded([captions[0] for captions in training.captions], training.pixels)
        return F.cosine_similarity(embedded([query.prompt], query.pixels[None]), images).numpy()


def test_scores_are_the_cosines_of_embeddings(tmp_path: Path) -> None:
    held_out = images(7, seed=9)
    method = fitted(tmp_path, held_out)
    asked = queries()
    for query, scores in zip(asked, method.score(asked), strict=True):
        assert scores.query is query
        assert scores.ids == images().ids
        assert scores.scores == pytest.approx(brute_force(method, query, images()), abs=1e-6)
        assert scores.null == pytest.approx(brute_force(method, query, held_out), abs=1e-6)
        assert np.ptp(scores.scores) > 0.05


def test_candidates_score_as_they_do_among_all(tmp_path: Path) -> None:
    method = fitted(tmp_path)
    (whole,) = method.score(queries(1))
    (some,) = method.score(queries(1), ["007", "002", "029"])
    assert some.ids == ("007", "002", "029")
    assert some.scores.tolist() == whole.scores[[7, 2, 29]].tolist()
    with pytest.raises(ValueError, match="not training images, such as 'x'"):
        list(method.score(queries(1), ["x"]))


def test_the_index_finds_what_scores_highest(tmp_path: Path) -> None:
    method = fitted(tmp_path)
    for scores, hits in zip(method.score(queries()), method.search(queries(), 6), strict=True):
        assert list(zip(hits.images, hits.scores.tolist(), strict=True)) == scores.top(6)
        assert hits.rows["license"].to_pylist() == [f"licence {int(name)}" for name in hits.images]
    together, alone = method.search(queries(), 4), [method.search([query], 4)[0] for query in queries()]
    assert [hits.scores.tolist() for hits in together] == [hits.scores.tolist() for hits in alone]


def test_another_index_changes_the_search_and_not_the_scores(tmp_path: Path) -> None:
    flat, lists = fitted(tmp_path), fitted(tmp_path, index="IVF4,Flat", search="nprobe=4")
    assert flat.identity() == lists.identity()
    for a, b in zip(flat.score(queries()), lists.score(queries()), strict=True):
        assert a.scores.tolist() == b.scores.tolist()
    for a, b in zip(flat.search(queries(), 5), lists.search(queries(), 5), strict=True):
        assert a.images == b.images


def test_what_was_taken_down_is_not_found_after_a_restart(tmp_path: Path) -> None:
    method = fitted(tmp_path)
    best = method.search(queries(1), 1)[0].images
    method.index.remove(best)
    again = fitted(tmp_path)
    assert again.search(queries(1), 1)[0].images != best
    (scores,) = again.score(queries(1))
    assert scores.scores[scores.ids.index(best[0])] == -2
    assert scores.top(COUNT)[-1][0] == best[0]
    assert scores.top(1)[0][0] == again.search(queries(1), 1)[0].images[0]
    with pytest.raises(ValueError, match="between 1 and the 29"):
        again.search(queries(1), COUNT)


@pytest.mark.parametrize("around", ["nothing", "ensemble", "among"])
def test_a_run_that_was_finished_before_a_take_down_is_not_shown_again(tmp_path: Path, around: str) -> None:
    def run() -> list[Scores]:
        method = fast(tmp_path)
        attributors: dict[str, Attributor] = {
            "nothing": method,
            "ensemble": RankEnsemble([method, Random()]),
            "among": Rerank(Random(), method, k=3),
        }
        store = Store(tmp_path / "store")
        data = TrainingData(images())
        return attribute(
            tmp_path / "run",
            attributor=attributors[around],
            data=data,
            model=None,
            queries=queries(1),
            store=store,
            runner=one_process(),
            options=None,
        )

    before = run()[0].scores.tolist()
    assert run()[0].scores.tolist() == before
    method = fitted(tmp_path)
    gone = method.search(queries(1), 1)[0].images
    method.index.remove(gone)
    with pytest.raises(ArtifactMismatchError, match=r"taken_down: on disk None, asked for '.*'\n.*another folder"):
        run()
    method.index.restore(gone)
    assert run()[0].scores.tolist() == before


def test_identity_follows_ranker_and_encoders(tmp_path: Path) -> None:
    one, other = fast(tmp_path / "a"), fast(tmp_path / "b", scale=-3.0)
    assert one.identity() == fast(tmp_path / "c").identity()
    assert one.identity() != other.identity()


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    for scale in (1.0, 0.0, float("nan")):
        with pytest.raises(ValueError, match="needs a negative one"):
            fast(tmp_path, scale)
    folder = tiny_ranker(tmp_path / "two", {"lengths": 2, "colours": 3})
    for encoders in ({}, {"colours": Colours()}, {"colours": Colours(), "length": Lengths()}):
        with pytest.raises(ValueError, match="takes features of lengths, colours"):
            LearnedRanker(str(folder), encoders=encoders)
    with pytest.raises(FileNotFoundError):
        LearnedRanker(str(tmp_path / "nothing"), encoders={})
    with pytest.raises(ValueError, match="fit must run"):
        next(fast(tmp_path).score(queries()))
    with pytest.raises(ValueError, match="fit must run"):
        fast(tmp_path).search(queries(), 1)


def test_encoders_of_another_width_are_refused(tmp_path: Path) -> None:
    save_ranker(tmp_path / "ranker", Ranker(9, width=4, hidden=1, outputs=4), ["lengths", "colours"])
    wide = tiny_ranker(tmp_path / "wide", {"lengths": 4, "colours": 5})
    method = LearnedRanker(str(wide), encoders={"colours": Colours(), "lengths": Lengths()})
    with pytest.raises(ValueError, match="takes 9 features, but lengths and colours give 5"):
        method.fit(TrainingData(images()), None, Store(tmp_path / "store"), one_process())


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    class Broken(Colours):
        def encode_images(self, pixels) -> Tensor:
            return super().encode_images(pixels) * float("nan")

    ranker = tiny_ranker(tmp_path / "ranker", {"colours": 3})
    method = LearnedRanker(str(ranker), encoders={"colours": Broken()})
    with pytest.raises(ValueError, match="Embedding 0 has length nan"):
        method.fit(TrainingData(images()), None, Store(tmp_path / "store"), one_process())


def test_a_region_is_refused(tmp_path: Path) -> None:
    query = queries(1)[0]
    part = Query(query.id, query.prompt, query.pixels, region=Region("box", np.ones((4, 4), dtype=bool)))
    with pytest.raises(ValueError, match="cannot attribute a region"):
        fitted(tmp_path).search([part], 1)


def held_out_set(folder: Path, method: LearnedRanker, count: int = 60) -> Path:
    """A teacher that says what the cosines say, and a little else."""
    random = np.random.default_rng(3)
    asked = queries(count)
    cosines = np.stack([scores.scores for scores in method.score(asked)])
    order = np.argsort(-cosines, axis=1).astype(np.int32)
    taught = np.exp(3 * np.take_along_axis(cosines, order, axis=1)) + 0.1 * random.normal(size=cosines.shape)
    features = {
        name: Features(
            encode([first for first, _ in images().captions], images().pixels),
            encode([query.prompt for query in asked], np.stack([query.pixels for query in asked])),
        )
        for name, encode in (
            ("lengths", lambda texts, _: Lengths().encode_texts(texts).numpy()),
            ("colours", lambda _, pixels: Colours().encode_images(pixels).numpy()),
        )
    }
    prompts = tuple(query.prompt for query in asked)
    names = tuple(query.id for query in asked)
    captions = tuple(first for first, _ in images().captions)
    identity = {"teacher": "planted"}
    taught_set = TeacherSet(
        images().ids, captions, names, prompts, order, taught.astype(np.float32), features, identity
    )
    write_teacher_set(folder, taught_set)
    return folder


def test_a_calibration_says_influence_and_how_concentrated_it_is(tmp_path: Path) -> None:
    plain = fitted(tmp_path)
    teacher, kept = held_out_set(tmp_path / "teacher", plain), tmp_path / "calibration"
    words = ("--ranker", str(tmp_path / "ranker"), "--teacher", str(teacher), "--output", str(kept))
    evaluate.main(["calibrate", *words, "--settings.confidence", "0.8"])
    method = fitted(tmp_path, calibration=str(kept))
    assert plain.identity() == {key: value for key, value in method.identity().items() if key != "calibration"}
    curve = load_calibration(kept, method.ranker, ["lengths", "colours"])
    assert curve.settings.confidence == 0.8
    for before, after in zip(plain.score(queries()), method.score(queries()), strict=True):
        assert before.estimates is None
        assert after.scores.tolist() == before.scores.tolist()
        assert after.estimates is not None
        assert after.estimates.values.tolist() == curve.estimate(after.scores).values.tolist()
        assert (after.estimates.low <= after.estimates.high).all()
        result = concentration(after.estimates.values)
        assert after.facts["influence_of_first_10"] == result.shares[10]
        assert after.facts["effective_pictures"] == result.effective
    data, store = TrainingData(images()), Store(tmp_path / "store")
    runs = [
        attribute(
            tmp_path / "run",
            attributor=method,
            data=data,
            model=None,
            queries=queries(),
            store=store,
            runner=one_process(),
        )
        for _ in range(2)
    ]
    assert runs[1][0].estimates is not None, "read from what the first run kept"
    table = pq.read_table(tmp_path / "run" / "ranking.parquet").to_pydict()
    by_image = dict(zip(images().ids, runs[0][0].estimates.values.tolist(), strict=True))
    rows = [row for row, query in enumerate(table["query"]) if query == "q0"]
    assert [table["estimate"][row] for row in rows] == [by_image[table["image"][row]] for row in rows]
    assert all(table["low"][row] <= table["high"][row] for row in rows)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('<p class="p">influence ') == 3 * 20
    assert "Influence of the first 10" in page


def test_a_calibration_on_what_the_ranker_learned_from_is_refused(tmp_path: Path) -> None:
    method = fitted(tmp_path)
    teacher = held_out_set(tmp_path / "teacher", method)
    save_ranker(
        tmp_path / "taught", method.ranker, ["lengths", "colours"], training={"teacher": {"teacher": "planted"}}
    )
    with pytest.raises(ValueError, match="on its own training queries would be too narrow"):
        calibrate_ranker(tmp_path / "calibration", tmp_path / "taught", teacher)
    calibrate_ranker(tmp_path / "calibration", tmp_path / "ranker", teacher)
    with pytest.raises(ArtifactMismatchError, match="is the calibration of another ranker"):
        fast(tmp_path / "other", scale=-3.0, calibration=str(tmp_path / "calibration"))


def test_through_the_command_line(tmp_path: Path) -> None:
    clip = str(tiny_clip(tmp_path / "clip"))
    encoders = {
        name: {"class_path": f"wherefrom.features.pretrained.OpenCLIP{kind}Encoder", "init_args": {"path": clip}}
        for name, kind in (("clip", "Image"), ("clip_text", "Text"))
    }
    ranker = str(tiny_ranker(tmp_path / "ranker", {"clip": 6, "clip_text": 6}))
    attributor = {"class_path": "LearnedRanker", "init_args": {"ranker": ranker, "encoders": encoders}}
    config = str(attribution_config(tmp_path, attributor=attributor))
    evaluate.main(["attribute", "-c", config])
    ranking = pq.read_table(tmp_path / "run" / "ranking.parquet").to_pydict()
    assert ranking["rank"] == list(range(1, 17))
    assert sorted(set(ranking["image"])) == sorted(ranking["image"])
    assert ranking["score"] == sorted(ranking["score"], reverse=True)
    assert all(-1 <= score <= 1 for score in ranking["score"])
    assert "fast attribution" in (tmp_path / "run" / "report.html").read_text()
    assert len(list((tmp_path / "store" / "index").glob("*/manifest.json"))) == 1
