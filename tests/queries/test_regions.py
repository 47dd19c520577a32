"""Regions: which latent cells a box or a mask covers, and the loss over them alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny import one_process, tiny_latents, tiny_model, tiny_query
from wherefrom.attributors import PixelSimilarity, Query, TrainingData
from wherefrom.commands.attribute import attribute
from wherefrom.gradients.query_loss import QueryLoss
from wherefrom.models.diffusion import SquareOutput
from wherefrom.models.parameter_subsets import select_weights, trainable
from wherefrom.queries.regions import Region
from wherefrom.runtime.artifacts import Store

SIZE = (8, 12)


def test_a_box_covers_cells_by_their_area() -> None:
    region = Region.from_box((1, 2, 6, 4), SIZE)
    assert region.name == "box 1,2,6,4"
    result = region.weights((4, 6))  # cells of 2 by 2 pixels
    expected = torch.zeros(4, 6, dtype=torch.float64)
    expected[1] = torch.tensor([0.5, 1.0, 1.0, 0, 0, 0])
    torch.testing.assert_close(result, expected)


def test_a_mask_counts_what_is_white(tmp_path: Path) -> None:
    pixels = np.zeros(SIZE, dtype=np.uint8)
    pixels[:2, :2], pixels[4, 4] = 255, 51
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    region = Region.from_file(tmp_path / "mask.png", SIZE)
    assert re.fullmatch("mask mask-[0-9a-f]{8}", region.name)
    result = region.weights((4, 6))
    expected = torch.zeros(4, 6, dtype=torch.float64)
    expected[0, 0], expected[2, 2] = 1.0, 0.2 / 4
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("box", [(0, 0, 13, 4), (-1, 0, 4, 4), (4, 0, 4, 4), (0, 6, 4, 2), (0, 0, 4)])
def test_a_box_that_is_no_part_of_the_image_is_refused(box: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(str(list(box)))):
        Region.from_box(box, SIZE)


def test_masks_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Mask .*none\.png is not a file"):
        Region.from_file(tmp_path / "none.png", SIZE)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match=r"Mask .*broken\.png cannot be read"):
        Region.from_file(tmp_path / "broken.png", SIZE)
    Image.new("L", (12, 8)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match=r"is empty: its mask is 0 everywhere"):
        Region.from_file(tmp_path / "black.png", SIZE)
    with pytest.raises(ValueError, match=r"Mask .*black\.png is 12 × 8 pixels, its image 12 × 12"):
        Region.from_file(tmp_path / "black.png", (12, 12))
    with pytest.raises(ValueError, match=r"numbers from 0 \(outside\) to 1 \(inside\)"):
        Region("bright", np.full(SIZE, 2.0, dtype=np.float32))


@pytest.mark.parametrize("square", [False, True])
def test_the_loss_is_the_mean_over_the_cells_inside(square: bool) -> None:
    model = SquareOutput(tiny_model()) if square else tiny_model()
    query, timesteps = tiny_query(), torch.tensor([100, 700])
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *query.latent.shape, generator=random, dtype=torch.float64)
    latents, states = query.latent.expand(2, -1, -1, -1), query.conditioning.expand(2)
    weights = torch.zeros(4, 4, dtype=torch.float64)
    weights[0, 1], weights[3] = 0.5, 1.0
    result = model.losses(latents, states, timesteps, noise, weights)
    output = model.predict(model.noise_schedule.noisy(latents, timesteps, noise), timesteps, states)
    error = (output if square else model.noise_schedule.target(latents, timesteps, noise) - output) ** 2
    expected = [
        sum(float(weights[i, j]) * float(error[b, c, i, j]) for c in range(4) for i in range(4) for j in range(4))
        / (4 * 4.5)
        for b in range(2)
    ]
    assert result.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_region_of_the_whole_image_changes_nothing_and_boxes_differ() -> None:
    model, query = tiny_model(), tiny_query()
    parameters = select_weights(model.denoiser, "cross_attention_kv")

    def gradient(box: tuple[int, int, int, int] | None) -> torch.Tensor:
        weights = None if box is None else Region.from_box(box, (8, 8)).weights((4, 4))
        with trainable(model.denoiser, parameters):
            loss = QueryLoss(model, replace(query, weights=weights), 0, one_process())
            return torch.cat([part.flatten() for part in loss.gradient(parameters, 0, 16).values()])

    torch.testing.assert_close(gradient((0, 0, 8, 8)), gradient(None), rtol=1e-10, atol=1e-15)
    left, right = gradient((0, 0, 4, 8)), gradient((4, 0, 8, 8))
    # The mean of the two halves' losses is the whole's.
    torch.testing.assert_close((left + right) / 2, gradient(None), rtol=1e-10, atol=1e-15)
    assert float(torch.cosine_similarity(left, right, dim=0)) < 0.99


def test_a_method_without_a_query_loss_refuses_a_region(tmp_path: Path) -> None:
    images = tiny_latents().images
    region = Region.from_box((0, 0, 4, 8), (8, 8))
    query = Query("query", "a prompt", np.zeros((8, 8, 3), np.uint8), region=region)
    with pytest.raises(ValueError, match=r"PixelSimilarity cannot attribute a region, but query 'query' asks for 'box"):
        attribute(
            tmp_path / "run",
            attributor=PixelSimilarity(),
            data=TrainingData(images),
            model=None,
            queries=[query],
            store=Store(tmp_path),
            runner=one_process(),
        )


def test_two_queries_of_one_name_are_refused(tmp_path: Path) -> None:
    query = Query("query", "a prompt", np.zeros((8, 8, 3), np.uint8))
    data, store = TrainingData(tiny_latents().images), Store(tmp_path)
    with pytest.raises(ValueError, match="Two queries are called 'query'"):
        attribute(
            tmp_path / "run",
            attributor=PixelSimilarity(),
            data=data,
            model=None,
            queries=[query, query],
            store=store,
            runner=one_process(),
        )


def test_what_is_outside_is_shown_faded() -> None:
    pixels = np.full((8, 12, 3), 200, dtype=np.uint8)
    shown = Region.from_box((0, 0, 6, 8), SIZE).show(pixels)
    assert (shown[:, :6] == 200).all()
    assert (shown[:, 6:] == 170).all()
