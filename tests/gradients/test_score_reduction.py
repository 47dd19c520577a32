"""Scores by band of timesteps and by caption: their means are the score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wherefrom.gradients.score_reduction import Breakdown, Flip, reduce_losses, spread_weights

STEPS = torch.tensor([0, 200, 400, 600, 800])
CHANGE = torch.randn(7, 2, 3, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("flip", ["max", "mean"])
def test_the_parts_average_to_the_score(flip: Flip) -> None:
    parts = Breakdown(timestep_bands=2, captions=True).parts(CHANGE, STEPS, flip)
    assert list(parts) == ["timesteps 0 to 400", "timesteps 600 to 800", "caption 1", "caption 2", "caption 3"]
    score, values = reduce_losses(CHANGE, flip).numpy(), list(parts.values())
    np.testing.assert_allclose((3 * values[0] + 2 * values[1]) / 5, score, rtol=1e-12)
    np.testing.assert_allclose(np.mean(values[2:], axis=0), score, rtol=1e-12)


def test_a_part_is_the_mean_over_its_part_of_the_grid() -> None:
    parts = Breakdown(timestep_bands=5, captions=True).parts(CHANGE, STEPS, "mean")
    for image in range(7):
        band = [float(CHANGE[image, f, k, 1, r]) for f in range(2) for k in range(3) for r in range(2)]
        assert parts["timesteps 200 to 200"][image] == pytest.approx(np.mean(band), rel=1e-12)
        caption = [float(CHANGE[image, f, 2, t, r]) for f in range(2) for t in range(5) for r in range(2)]
        assert parts["caption 3"][image] == pytest.approx(np.mean(caption), rel=1e-12)


def test_nothing_is_broken_down_unless_asked_for() -> None:
    assert Breakdown().parts(CHANGE, STEPS, "max") == {}


def test_more_bands_than_timesteps_are_refused() -> None:
    Breakdown(5).check(5)
    with pytest.raises(ValueError, match="6 timestep_bands need at least as many timesteps; the grid has 5"):
        Breakdown(6).check(5)
    with pytest.raises(ValueError, match="must not be negative; given -1"):
        Breakdown(-1)


def test_spread_weights_bring_all_timesteps_to_one_spread() -> None:
    scale = torch.tensor([10.0, 1.0, 0.5, 2.0, 1.0])
    change = torch.randn(4000, 2, 1, 5, 1, generator=torch.Generator().manual_seed(1)) * scale[:, None] + 3.0
    weights = spread_weights(change)
    assert float(weights.mean()) == pytest.approx(1.0)
    np.testing.assert_allclose(weights * scale, (weights * scale).mean().expand(5), rtol=0.03)
    assert spread_weights(change * 7.0).tolist() == pytest.approx(weights.tolist(), rel=1e-5), "units do not matter"
    assert spread_weights(torch.zeros(4, 2, 1, 5, 1)).tolist() == [1.0] * 5, "nothing moved"
