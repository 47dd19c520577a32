"""Rankings of a fixed case stay what they were, whatever is renamed or moved.

`python -m tests.attributors.test_fixed_rankings` writes the record again: only where a change of numbers is meant.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny import one_process, tiny_folder, tiny_pipeline, tiny_ranker
from wherefrom.attributors import (
    TRAK,
    AttributionByUnlearning,
    Attributor,
    InfluenceFunction,
    LearnedRanker,
    TrainingData,
)
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings
from wherefrom.curvature import EKFAC, DiagonalFisher, FisherSettings
from wherefrom.data.encoded_images import encode_image_set
from wherefrom.data.image_folder import build_image_folder, split_images
from wherefrom.features.base import ImageEncoder, TextEncoder
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.gradients.projection import Projection
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import generate
from wherefrom.runtime.artifacts import Store

RECORD = Path(__file__).with_name("fixed_rankings.json")


class MeanColour(ImageEncoder):
    """Mean colour, centred."""

    def encode_images(self, pixels):
        return torch.from_numpy(np.asarray(pixels, dtype=np.float32).mean((1, 2)) / 128 - 1)

    def identity(self):
        return {"image_encoder": "mean colour"}


class Lengths(TextEncoder):
    """How long a caption is, in letters and words."""

    def encode_texts(self, captions):
        return torch.tensor([[len(text) / 10, len(text.split()) / 2] for text in captions])

    def identity(self):
        return {"text_encoder": "lengths"}


def methods(folder: Path) -> dict[str, Attributor]:
    step = UnlearningSettings(noise_samples=32, measurement_samples=32, relative_loss_increase=0.05)
    grid, fisher = LossGrid(timesteps=4), FisherSettings(samples_per_image=2)
    projection = Projection(dimension=128)
    ranker = tiny_ranker(folder / "ranker", {"lengths": 2, "colours": 3})
    return {
        "abu": AttributionByUnlearning(unlearning=step, grid=grid, curvature=DiagonalFisher(fisher)),
        "abu_plus": AttributionByUnlearning(unlearning=step, grid=grid, curvature=EKFAC(fisher)),
        "trak": TRAK(weights="all", projection=projection, grid=grid),
        "d_trak": TRAK(weights="all", projection=projection, grid=grid, output="square_output"),
        "influence": InfluenceFunction(noise_samples=32, grid=grid, curvature=EKFAC(fisher)),
        "ranker": LearnedRanker(str(ranker), encoders={"colours": MeanColour(), "lengths": Lengths()}),
    }


def rankings(folder: Path) -> dict[str, dict[str, Any]]:
    """Method -> query -> ids from first to last, scores and those of the null as exact hexadecimal numbers."""
    model, store, runner = load_model(str(tiny_pipeline(folder / "model"))), Store(folder / "store"), one_process()
    train, held_out = split_images(build_image_folder(store, tiny_folder(folder / "pictures", count=24)), 0.1)
    latents = [encode_image_set(each, encoder=model.encoder, store=store) for each in (train, held_out)]
    data = TrainingData(train, latents[0], held_out, latents[1])
    queries = generate(model, prompts=["a big red square", "light circle"], seed=0, shape=(4, 4, 4), sampling_steps=2)
    result: dict[str, dict[str, Any]] = {}
    for name, method in methods(folder).items():
        method.fit(data, model, store, runner)
        result[name] = {
            scores.query.id: {
                "order": [image for image, _ in scores.top(len(scores.ids))],
                "scores": [float(score).hex() for _, score in scores.top(len(scores.ids))],
                "null": [float(score).hex() for score in scores.null],
            }
            for scores in method.score(queries)
        }
    return result


def machine() -> dict[str, str]:
    """What decides the last bits of a sum."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def test_rankings_of_the_fixed_case_are_what_they_were(tmp_path: Path) -> None:
    record = json.loads(RECORD.read_text())
    result = rankings(tmp_path)
    if record["machine"] == machine():
        assert result == record["rankings"]
    for name, by_query in record["rankings"].items():
        for query, kept in by_query.items():
            mine = result[name][query]
            assert sorted(mine["order"]) == sorted(kept["order"])
            position = {image: number for number, image in enumerate(mine["order"])}
            before = np.array([float.fromhex(score) for score in kept["scores"]])
            after = np.array([float.fromhex(mine["scores"][position[image]]) for image in kept["order"]])
            assert after == pytest.approx(before, abs=1e-3 * np.ptp(before))  # other machines end sums in other bits


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        record = {"machine": machine(), "rankings": rankings(Path(made))}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
