"""A tiny training set, queries and influence functions that tests of several methods share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.tiny import one_process, tiny_latents
from wherefrom.attributors import Attributor, InfluenceFunction, Query, Scores, TrainingData
from wherefrom.curvature import EKFAC, FisherSettings
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime.artifacts import Store

TRAIN, HELD_OUT = tiny_latents(9), tiny_latents(4, seed=1)
GRID, FISHER = LossGrid(timesteps=3), FisherSettings(1)
QUERY = Query(
    "query",
    "a big red square",
    np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8),
    torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
)
OTHER = Query("other", "blue circle", QUERY.pixels, torch.ones(4, 4, 4, dtype=torch.float64))


def run(attributor: Attributor, model: DiffusionModel | None, root: Path, *queries: Query) -> list[Scores]:
    """Fits the method to the tiny training set and scores the queries, or the one."""
    data = TrainingData(TRAIN.images, TRAIN, HELD_OUT.images, HELD_OUT)
    attributor.fit(data, model, Store(root), one_process())
    return list(attributor.score(queries or [QUERY]))


def influence(**options: Any) -> InfluenceFunction:
    """A quick influence function of all weights."""
    settings = {"weights": "all", "noise_samples": 12, "grid": GRID, "curvature": EKFAC(FISHER), **options}
    return InfluenceFunction(**settings)
