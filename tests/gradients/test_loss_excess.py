"""The loss of a query beside training images' losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny import one_process, tiny_latents, tiny_model
from wherefrom.gradients.loss_excess import excess, loss_of, typical_losses
from wherefrom.gradients.loss_grid import LossGrid, LossPass
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store


def test_the_querys_loss_is_the_mean_of_single_draws() -> None:
    model, data = tiny_model(), tiny_latents(2)
    latent, conditioning = data.groups[0].latents[0, 0], data.groups[0].conditioning.at(0, 0)
    losses = []
    for index in range(200):  # ten timesteps, twenty draws of each
        noise = keyed_random.normal(keyed_random.combine(702, 5, index)[None], latent.shape, model.dtype)
        losses.append(
            float(model.losses(latent[None], conditioning.at(None), torch.tensor([100 * (index // 20)]), noise))
        )
    assert loss_of(model, latent, conditioning, seed=5) == pytest.approx(np.mean(losses), rel=1e-12)


def test_typical_losses_are_those_of_images_chosen_by_their_ids(tmp_path: Path) -> None:
    model, data = tiny_model(), tiny_latents(300)
    result = typical_losses(model, data, Store(tmp_path), one_process())
    assert result.shape == (256,)
    work = LossPass(model, data, LossGrid(timesteps=10, flips=False), 64)
    work.step(range(len(data)))
    every = work.losses.flatten(1).mean(dim=1).numpy()
    assert set(np.round(result, 12)) < set(np.round(every, 12))
    turned = data.subset(list(range(299, -1, -1)))
    again = typical_losses(model, turned, Store(tmp_path / "turned"), one_process())
    np.testing.assert_allclose(np.sort(again), np.sort(result), rtol=1e-12)


def test_excess_counts_interquartile_ranges_above_the_upper_quartile() -> None:
    typical = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert excess(4.0, typical) == 0.0
    assert excess(10.0, typical) == 3.0
    assert excess(3.0, typical) == -0.5
    assert excess(2.0, [1.0, 1.0]) == np.inf
