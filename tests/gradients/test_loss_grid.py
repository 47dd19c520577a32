"""The contract of keyed noise: a loss belongs to (seed, id, flip, caption, timestep, draw) and to nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from tests.support.tiny import moved_copy, one_process, one_shape, tiny_latents, tiny_model
from wherefrom.data.encoded_images import EncodedImages, LatentGroup
from wherefrom.gradients.loss_grid import LossGrid, LossPass, measure_losses
from wherefrom.gradients.score_reduction import Flip, reduce_losses
from wherefrom.models.conditioning import PROMPT
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.rankings.ranking_file import order_of
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store

LOSS = 201  # the salt of the draws is part of the contract
DATA = tiny_latents(5, captions=2)
LATENTS, EMBEDDINGS = DATA.groups[0].latents, DATA.groups[0].conditioning[PROMPT]
NULL = DATA.empty[PROMPT]
GRID = LossGrid(timesteps=3, noise_samples=2, seed=4)


def losses(model: DiffusionModel, data: EncodedImages, grid: LossGrid = GRID, batch_size: int = 64) -> Tensor:
    work = LossPass(model, data, grid, batch_size)
    half = len(data) // 2
    work.step(range(half))
    work.step(range(half, len(data)))
    return work.losses


def change(
    model: DiffusionModel,
    moved: DiffusionModel,
    data: EncodedImages,
    grid: LossGrid,
    batch_size: int,
    flip: Flip = "max",
) -> np.ndarray:
    """τ."""
    return reduce_losses(losses(moved, data, grid, batch_size) - losses(model, data, grid, batch_size), flip).numpy()


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_losses_equal_a_loop_over_single_evaluations(prediction: str) -> None:
    model = tiny_model(prediction=prediction)
    result = losses(model, DATA)
    assert result.shape == (5, 2, 2, 3, 2)
    assert result.dtype == torch.float64
    for n, name in enumerate(DATA.ids):
        for flip in range(2):
            for caption in range(2):
                for t, timestep in enumerate((0, 333, 666)):
                    for draw in range(2):
                        item = keyed_random.combine(LOSS, 4, flip, caption, timestep, draw)
                        key = keyed_random.combine(keyed_random.hash_text(name), item)
                        noise = keyed_random.normal(key[None], (4, 4, 4), torch.float64)[0]
                        latent, embeddings = LATENTS[n, flip], EMBEDDINGS[n, caption]
                        signal, spread = model.noise_schedule.signal[timestep], model.noise_schedule.spread[timestep]
                        with torch.no_grad():
                            output = model.denoiser(
                                (signal * latent + spread * noise)[None],
                                timestep,
                                encoder_hidden_states=embeddings[None],
                            ).sample[0]
                        target = noise if prediction == "epsilon" else signal * noise - spread * latent
                        expected = (target - output).square().mean()
                        torch.testing.assert_close(result[n, flip, caption, t, draw], expected, rtol=1e-10, atol=0)
    assert len(result.flatten().unique()) == result.numel()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    model, data = tiny_model(), tiny_latents(20)
    moved, grid = moved_copy(model), LossGrid(timesteps=2)
    torch.testing.assert_close(losses(model, data, grid, batch_size), losses(model, data, grid, 256), rtol=1e-9, atol=0)
    small, large = change(model, moved, data, grid, batch_size), change(model, moved, data, grid, 256)
    np.testing.assert_allclose(small, large, rtol=1e-9, atol=1e-12)
    assert np.array_equal(order_of(data.ids, small), order_of(data.ids, large))


def test_neither_the_order_of_the_images_nor_the_others_matter() -> None:
    model = tiny_model()
    whole = losses(model, DATA)
    torch.testing.assert_close(losses(model, DATA.subset([3, 0, 4, 2, 1])), whole[[3, 0, 4, 2, 1]], rtol=1e-10, atol=0)
    torch.testing.assert_close(losses(model, DATA.subset([4, 1])), whole[[4, 1]], rtol=1e-10, atol=0)


def test_a_finer_grid_keeps_the_draws_of_a_coarser_one() -> None:
    model = tiny_model()
    coarse = losses(model, DATA, LossGrid(timesteps=2, noise_samples=1, seed=4))
    fine = losses(model, DATA, LossGrid(timesteps=4, noise_samples=3, seed=4))
    torch.testing.assert_close(fine[:, :, :, ::2, :1], coarse, rtol=1e-10, atol=0)


def test_seeds_ids_and_flips_have_noise_of_their_own() -> None:
    model = tiny_model()
    base = losses(model, DATA)
    assert not torch.isclose(losses(model, DATA, LossGrid(3, 2, seed=5)), base, rtol=1e-4).any()
    images = DATA.images.subset([1, 2, 3, 4, 0])  # the same latents under other ids
    renamed = one_shape(images, LATENTS, EMBEDDINGS, NULL, "renamed")
    assert not torch.isclose(losses(model, renamed), base, rtol=1e-4).any()
    symmetric = one_shape(DATA.images, LATENTS[:, [0, 0]], EMBEDDINGS, NULL, "symmetric")
    both = losses(model, symmetric)
    assert torch.equal(both[:, 0], base[:, 0])
    assert not torch.isclose(both[:, 0], both[:, 1], rtol=1e-4).any()


@pytest.mark.parametrize("flip", ["max", "mean"])
def test_it_does_not_matter_which_of_the_two_mirror_images_is_stored_first(flip: Flip) -> None:
    model = tiny_model()
    moved = moved_copy(model)
    swapped = one_shape(DATA.images, LATENTS.flip(1), EMBEDDINGS, NULL, "swapped")

    def swapped_losses(which: DiffusionModel) -> Tensor:
        work = LossPass(which, swapped, GRID, 64)
        # The mirror image is now in front, so its bit is 0 and the noise that bit 1 had goes with it.
        work.item_keys = work.item_keys.unflatten(0, (2, -1)).flip(0).flatten()
        work.step(range(len(DATA)))
        return work.losses

    result = reduce_losses(swapped_losses(moved) - swapped_losses(model), flip).numpy()
    np.testing.assert_allclose(result, change(model, moved, DATA, GRID, 64, flip), rtol=1e-9, atol=1e-12)


def test_without_flips_only_the_image_itself_is_measured() -> None:
    model = tiny_model()
    alone = losses(model, DATA, LossGrid(3, 2, 4, flips=False))
    assert alone.shape == (5, 1, 2, 3, 2)
    torch.testing.assert_close(alone, losses(model, DATA)[:, :1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_single_precision_gives_the_same_ranking(batch_size: int) -> None:
    count, grid = 150, LossGrid(timesteps=2, flips=False)
    data, double = tiny_latents(count), tiny_model()
    single = tiny_model(dtype=torch.float32)
    moved = moved_copy(double)
    rounded = moved_copy(single)  # the same step, rounded
    expected = change(single, rounded, data, grid, 256)
    for result in (change(single, rounded, data, grid, batch_size), change(double, moved, data, grid, 256)):
        assert np.abs(result - expected).max() <= 1e-2 * expected.std()
        assert spearmanr(result, expected).statistic >= 0.9999
        top = [set(order_of(data.ids, scores)[:100]) for scores in (result, expected)]
        assert len(top[0] & top[1]) >= 98


def test_flips_are_reduced_after_captions_timesteps_and_draws() -> None:
    table = torch.zeros(2, 2, 2, 2, 1)
    table[0, 0] = 1.0  # the image itself changed by 1, its mirror image by 0
    table[1, 1, 0] = 4.0  # the mirror image changed by 4 under one of two captions
    table[1, 0, 1, 0] = 10.0  # the image itself by 10 at one caption and timestep of four
    assert reduce_losses(table, "max").tolist() == [1.0, 2.5]
    assert reduce_losses(table, "mean").tolist() == [0.5, 2.25]


def test_a_loss_that_is_no_number_names_the_image() -> None:
    latents = LATENTS.clone()
    latents[3, 1, 0, 0, 0] = float("inf")
    broken = one_shape(DATA.images, latents, EMBEDDINGS, NULL, "broken")
    with pytest.raises(ValueError, match=r"The loss of image 'picture/003' is not finite"):
        losses(tiny_model(), broken)


def test_the_grid_is_that_of_the_paper() -> None:
    assert LossGrid(20).steps(1000).tolist() == list(range(0, 1000, 50))
    assert LossGrid(10).steps(1000).tolist() == list(range(0, 1000, 100))
    assert LossGrid(3).steps(10).tolist() == [0, 3, 6]
    assert LossGrid(5, offset=0.5).steps(1000).tolist() == [100, 300, 500, 700, 900]
    for count in range(1, 201):
        assert LossGrid(count).steps(1000).tolist() == [index * 1000 // count for index in range(count)]
    with pytest.raises(ValueError, match=r"offset must be at least 0 and less than 1; given 1\.0"):
        LossGrid(offset=1.0)
    with pytest.raises(ValueError, match="timesteps must be at least 1; given 0"):
        LossGrid(0)
    with pytest.raises(ValueError, match=r"between 1 and 1000.*given 1001"):
        LossGrid(1001).steps(1000)


def test_losses_are_kept_and_found_again(tmp_path: Path) -> None:
    chunks: list[tuple[int, int]] = []

    def measure(
        model: DiffusionModel, data: EncodedImages = DATA, grid: LossGrid = GRID, name: str | None = None
    ) -> Tensor:
        chunks.clear()
        return measure_losses(
            model,
            data=data,
            grid=grid,
            store=Store(tmp_path),
            runner=one_process(),
            batch_size=64,
            weights=name,
            progress=lambda done, total: chunks.append((done, total)),
        )

    model = tiny_model()
    first = measure(model)
    assert chunks == [(1, 1)]
    assert torch.equal(first, losses(model, DATA))
    assert torch.equal(measure(model), first)
    assert not chunks
    for other in (
        lambda: measure(moved_copy(model)),
        lambda: measure(model, tiny_latents(5, captions=2, seed=1)),
        lambda: measure(model, DATA.subset([0, 1])),
        lambda: measure(model, grid=LossGrid(3, 2, 5)),
        lambda: measure(model, name="moved weights"),
        lambda: measure(tiny_model(dtype=torch.float32)),
    ):
        other()
        assert chunks, "taken for what was measured before"


def test_images_of_two_shapes_have_the_losses_that_each_shape_has_alone() -> None:
    model, other, images = tiny_model(), tiny_latents(5, 2, seed=9), tiny_latents(10, 2).images
    wide = LatentGroup(torch.cat([other.groups[0].latents] * 2, dim=-1), other.groups[0].conditioning)
    members = (torch.tensor([8, 0, 3, 4, 9]), torch.tensor([1, 7, 2, 5, 6]))
    mixed = EncodedImages(images, (DATA.groups[0], wide), DATA.empty, "mixed", members=members)
    for batch_size in (3, 256):
        result = losses(model, mixed, batch_size=batch_size)
        for group, positions in zip(mixed.groups, members, strict=True):
            of_group = images.subset(positions.tolist())
            alone = EncodedImages(of_group, (group,), DATA.empty, "alone")
            torch.testing.assert_close(result[positions], losses(model, alone), rtol=1e-9, atol=0)
    scores = change(model, moved_copy(model), mixed, LossGrid(timesteps=2), 7)
    assert scores.shape == (10,)
    assert np.isfinite(scores).all()
