"""What the benchmark of costs measures and prints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import attribution
from tests.support.tiny import tiny_encoder, tiny_latents, tiny_model
from wherefrom.attributors import (
    TRAK,
    AttributionByUnlearning,
    Attributor,
    InfluenceFunction,
    PixelSimilarity,
    Query,
    TrainingData,
)
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings
from wherefrom.curvature import DiagonalFisher, FisherSettings
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.gradients.projection import Projection
from wherefrom.runtime.artifacts import Store

GRID = LossGrid(timesteps=1)
METHODS: dict[str, tuple[Attributor, set[str], set[str]]] = {
    "abu": (
        AttributionByUnlearning(
            unlearning=UnlearningSettings(
                noise_samples=8, measurement_samples=8, relative_loss_increase=None, alpha=1.0
            ),
            grid=GRID,
            curvature=DiagonalFisher(FisherSettings(1)),
        ),
        {"curvature", "losses", "features"},
        {"gradient", "step", "pass", "rest"},
    ),
    "influence": (
        InfluenceFunction(noise_samples=8, grid=GRID, curvature=DiagonalFisher(FisherSettings(1))),
        {"curvature", "features"},
        {"gradient", "pass", "rest"},
    ),
    "trak": (
        TRAK("cross_attention_kv", projection=Projection(100), grid=GRID, noise_samples=8),
        {"features"},
        {"gradient", "products", "rest"},
    ),
    "pixel": (PixelSimilarity(), {"features"}, {"rest"}),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_the_parts_of_a_methods_seconds_are_told(name: str, tmp_path: Path) -> None:
    method, once, query = METHODS[name]
    model = tiny_model(encoder=tiny_encoder(tmp_path / "text"))
    train, held_out = tiny_latents(6), tiny_latents(3, seed=1)
    data = TrainingData(train.images, train, held_out.images, held_out)
    queries = [Query(name, "red", np.zeros((8, 8, 3), dtype=np.uint8), torch.zeros(4, 4, 4)) for name in ("a", "b")]
    store = Store(tmp_path / "store")
    cost = attribution.measure(method, data, model, queries, store)
    assert set(cost.once) == once
    assert set(cost.query) == query
    assert min(*cost.once.values(), *cost.query.values(), 0) == 0
    assert cost.peak >= max(cost.scoring, cost.fit) >= min(cost.scoring, cost.fit, cost.before) > 0
    assert (cost.stored > 0) == store.root.exists() == (name != "pixel")
    assert cost.seconds == pytest.approx(sum(cost.query.values()))


def test_what_is_told_together_is_taken_apart() -> None:
    abu = {"gradient_s": 1.0, "unlearning_s": 5.0, "losses_s": 7.0, "alpha": 3.0}
    assert attribution.parts(abu) == {"gradient": 1.0, "step": 4.0, "pass": 7.0}
    assert attribution.parts({"gradient_s": 1.0, "pass_s": 2.5}) == {"gradient": 1.0, "pass": 2.5}
    assert attribution.parts({"gradient_s": 1.0, "query_s": 1.5}) == {"gradient": 1.0, "products": 0.5}
    assert attribution.parts({}) == {}
    fit = {"curvature": 2.0, "losses": 3.0}
    assert attribution.once_of(fit, 6.0) == {**fit, "features": 1.0}
    assert attribution.query_of([{"pass": 1.0}, {"pass": 3.0}], 8.0) == {"pass": 2.0, "rest": 2.0}
    assert attribution.query_of([{}, {}], 8.0) == {"rest": 4.0}


def test_a_row_is_read_in_its_units() -> None:
    mega = 2**20
    cost = attribution.Cost(
        {"curvature": 12.0, "features": 0.25},
        {"gradient": 1.5, "rest": 0.5},
        1000 * mega,
        1100 * mega,
        1010 * mega,
        2048 * mega,
        mega // 2,
    )
    text = attribution.table({"abu": cost}, {"clip": "no weights"})
    assert "| abu | 12 | – | 0.25 | 1.5 | – | – | – | 0.5 | 2 | 2.00 | 100 | 10 | 0.5 |" in text
    assert text.splitlines()[-1] == "clip is skipped: no weights"
    head, line, *_ = text.splitlines()
    assert head.count("|") - 1 == line.count("---") == 14


def test_the_reason_of_an_error_is_one_line() -> None:
    parsed = (
        "Does not validate\n  Errors:\n    - Does not validate either\n      - No weights here\n    - Expected None"
    )
    assert attribution.reason(ValueError(parsed)) == "No weights here"
    assert attribution.reason(OSError("No file\nLook elsewhere")) == "No file"
    assert attribution.reason(ValueError()) == "ValueError"


def test_a_part_of_the_images_keeps_the_share_of_the_null() -> None:
    train, held_out = tiny_latents(12), tiny_latents(4, seed=1)
    part = attribution.part_of(TrainingData(train.images, train, held_out.images, held_out), 6)
    assert part.latents is not None
    assert part.held_out is not None
    assert part.latents.ids == part.images.ids
    assert (len(part.images), len(part.held_out)) == (6, 2)
    whole = attribution.part_of(TrainingData(train.images, train), 9)
    assert set(part.images.ids) < set(whole.images.ids)
    assert whole.held_out is None
