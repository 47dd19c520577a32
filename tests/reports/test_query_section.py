"""What a report warns of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tests.support.tiny import one_process, tiny_encoder, tiny_latents, tiny_model
from wherefrom.attributors import InfluenceFunction, PixelSimilarity, Query, Random, TrainingData
from wherefrom.commands.attribute import attribute
from wherefrom.commands.compare import compare
from wherefrom.curvature import Identity
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.queries.types import Scores
from wherefrom.reports.query_section import sign_notes, tie_notes
from wherefrom.reports.scores_view import ScoresView
from wherefrom.runtime.artifacts import Store


def test_the_report_says_when_nothing_stands_out(tmp_path: Path) -> None:
    train_set, held_out = tiny_latents(12).images, tiny_latents(30, seed=1).images
    query = Query("query", "red", np.zeros((8, 8, 3), dtype=np.uint8))
    for seed in range(3):
        data = TrainingData(train_set, held_out=held_out)
        folder = tmp_path / str(seed)
        attribute(
            folder,
            attributor=Random(seed),
            data=data,
            model=None,
            queries=[query],
            store=Store(tmp_path / "store"),
            runner=one_process(),
        )
        assert "Nothing stands out" in (folder / "report.html").read_text()


def test_the_report_warns_of_an_image_that_the_model_cannot_represent(tmp_path: Path) -> None:
    data = tiny_latents(40)
    training = TrainingData(data.images, data)
    model = tiny_model(encoder=tiny_encoder(tmp_path / "text"))
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    queries = [
        Query("usual", "red", pixels, data.groups[0].latents[3, 0]),
        Query("strange", "red", pixels, data.groups[0].latents[3, 0] * 9),
    ]
    method = InfluenceFunction(noise_samples=4, grid=LossGrid(timesteps=1), curvature=Identity())
    results = attribute(
        tmp_path / "run",
        attributor=method,
        data=training,
        model=model,
        queries=queries,
        store=Store(tmp_path / "store"),
        runner=one_process(),
    )
    usual, strange = (scores.facts["loss_excess"] for scores in results)
    assert usual < 3 < strange
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("The model cannot represent this image well") == 1
    assert f"{strange:.1f} interquartile ranges" in page


def test_the_report_warns_of_scores_that_are_nearly_uniform(tmp_path: Path) -> None:
    data = TrainingData(tiny_latents(400).images)
    query = Query("query", "red", np.zeros((8, 8, 3), dtype=np.uint8))
    attribute(
        tmp_path / "run",
        attributor=Random(0),
        data=data,
        model=None,
        queries=[query],
        store=Store(tmp_path / "store"),
        runner=one_process(),
    )
    assert "The scores are nearly uniform" in (tmp_path / "run" / "report.html").read_text()


def test_scores_that_are_all_equal_are_said_to_be_no_order(tmp_path: Path) -> None:
    images = tiny_latents(30).images
    same = TrainingData(replace(images, pixels=np.full_like(np.asarray(images.pixels), 7)))
    query = Query("query", "red", np.zeros((8, 8, 3), dtype=np.uint8))
    run = {"model": None, "queries": [query], "store": Store(tmp_path / "store"), "runner": one_process()}
    (scores,) = attribute(tmp_path / "run", attributor=PixelSimilarity(), data=same, **run)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "All scores are equal" in page
    assert "nearly uniform" not in page
    assert "Influence by group" not in page
    assert scores.all_equal
    assert repr(scores).endswith("30 training images, all scores are equal>")
    view = ScoresView.of(scores, same)
    assert "All scores are equal" in view.lines(3)[1]
    assert "All scores are equal" in view._repr_html_()
    methods = {"pixel": PixelSimilarity(), "random": Random(0)}
    compare(tmp_path / "both", methods=methods, data=same, **run)
    page = (tmp_path / "both" / "report.html").read_text()
    assert page.count("All scores are equal: this order is that of the names.") == 1
    assert "undefined: constant scores" in page
    assert pq.read_table(tmp_path / "both" / "correlations.parquet")["queries"].to_pylist() == [1, 0, 0, 1]


def test_a_tie_at_the_edge_of_what_is_shown_is_said() -> None:
    query = Query("query", "red", np.zeros((8, 8, 3), dtype=np.uint8))
    scores = Scores(query, tuple("abcdef"), np.array([3.0, 1, 1, 2, 1, 0]), np.zeros(0))
    assert tie_notes(scores, 2) == []
    assert tie_notes(scores, 5) == []
    assert "From place 3 on, 3 training images have the same score" in tie_notes(scores, 3)[0]
    assert "From place 3 on, 3 training images" in tie_notes(scores, 4)[0]


def test_negative_scores_among_the_first_are_explained() -> None:
    query = Query("query", "red", np.zeros((8, 8, 3), dtype=np.uint8))
    scores = Scores(query, tuple("abcd"), np.array([2.0, -1.0, 1.0, -3.0]), np.zeros(0))
    assert sign_notes(scores, 2) == []
    assert "From place 3 on, scores are 0 or less." in sign_notes(scores, 3)[0]
    below = Scores(query, tuple("ab"), np.array([-2.0, -1.0]), np.zeros(0))
    assert "No score is above 0: all are 0 or less." in sign_notes(below, 20)[0]
