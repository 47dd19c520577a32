"""JourneyTRAK against its formula with the gradients of single steps, and through the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from tests.support.attribution import HELD_OUT, QUERY, TRAIN
from tests.support.tiny import attribution_config, one_process, tiny_encoder, tiny_latents, tiny_model
from wherefrom.attributors import JourneyTRAK, Query, Scores, TrainingData
from wherefrom.attributors.trak import projected_features as module
from wherefrom.attributors.trak.journey import JourneyLoss
from wherefrom.gradients.loss_grid import DrawnLosses, LossSamples
from wherefrom.gradients.projection import Projection
from wherefrom.gradients.query_loss import QueryLatent
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import select_weights
from wherefrom.models.sampling import Trajectory
from wherefrom.rankings.ranking_file import read_ranking
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store

P, DRAWS = Projection(128), LossSamples(noise_samples=3)
STEPS = (999, 749, 499, 249)
PREDICTED = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
JOURNEY = replace(QUERY, trajectory=Trajectory(STEPS, PREDICTED))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_model(encoder=tiny_encoder(tmp_path_factory.mktemp("text") / "encoder"))


def journey(**options: Any) -> JourneyTRAK:
    return JourneyTRAK(**{"projection": P, "grid": DRAWS, "timesteps": [749, 249], "resamplings": 4, **options})


def fitted(attributor: JourneyTRAK, model: DiffusionModel, root: Path) -> JourneyTRAK:
    data = TrainingData(TRAIN.images, TRAIN, HELD_OUT.images, HELD_OUT)
    attributor.fit(data, model, Store(root), one_process())
    return attributor


def run(attributor: JourneyTRAK, model: DiffusionModel, root: Path, query: Query = JOURNEY) -> Scores:
    (scores,) = fitted(attributor, model, root).score([query])
    return scores


def projected(model: DiffusionModel, loss: torch.Tensor) -> torch.Tensor:
    """Pᵀ∇l by autograd and the whole matrix."""
    parameters = select_weights(model.denoiser, "all")
    matrix = torch.cat(
        [
            P.rows(n, start=0, stop=v.numel(), device=torch.device("cpu"), dtype=torch.float64)
            for n, v in parameters.items()
        ]
    )
    gradient = torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(parameters.values()))])
    return gradient @ matrix / P.dimension**0.5


def by_hand(model: DiffusionModel, timesteps: list[int], flip: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of each step alone and of their sum, one loss at a time."""
    assert model.encoder is not None
    states = model.encoder.text.encode([QUERY.prompt])
    latent = QueryLatent(QUERY.id, PREDICTED[0], states.at(0))
    model.denoiser.requires_grad_(True)
    features = torch.zeros(len(TRAIN), 2, P.dimension, dtype=torch.float64)
    losses = DrawnLosses(model, TRAIN, DRAWS, 1)
    for image in range(len(TRAIN)):
        for item, side in enumerate(losses.flip.tolist()):
            loss = losses.item_losses(torch.tensor([image]), torch.tensor([item])).sum()
            features[image, side] += projected(model, loss) / 3
    asked = []
    for timestep in timesteps:
        one = JourneyLoss(model, query=latent, trajectory=Trajectory(STEPS, PREDICTED), seed=0, runner=one_process())
        _, times, keys = one.at(402, timestep, torch.arange(4))
        assert times.tolist() == [timestep] * 4
        predicted = PREDICTED[STEPS.index(timestep)]
        noise = [keyed_random.normal(key[None], (4, 4, 4), torch.float64) for key in keys]
        each = [model.losses(predicted[None], states.double(), torch.tensor([timestep]), draw).sum() for draw in noise]
        asked.append(projected(model, torch.stack(each).mean()))
    model.denoiser.requires_grad_(False)
    gram = features[:, 0].T @ features[:, 0]
    gram += 0.01 * gram.trace() / P.dimension * torch.eye(P.dimension, dtype=torch.float64)
    products = torch.stack([features @ torch.linalg.solve(gram, each) for each in asked])
    reduce = {"max": lambda by_flip: by_flip.amax(dim=-1), "mean": lambda by_flip: by_flip.mean(dim=-1)}[flip]
    return reduce(products), reduce(products.sum(dim=0))


@pytest.mark.parametrize("flip", ["max", "mean"])
def test_it_equals_the_formula(model: DiffusionModel, tmp_path: Path, flip: Any) -> None:
    attributor = journey(flip=flip)
    result = run(attributor, model, tmp_path)
    steps, total = by_hand(model, [749, 249], flip)
    np.testing.assert_allclose(result.scores, total.numpy(), rtol=1e-6)
    timesteps, apart = attributor.step_scores(JOURNEY)
    assert list(timesteps) == [749, 249]
    np.testing.assert_allclose(apart, steps.numpy(), rtol=1e-6)
    assert result.null.shape == (len(HELD_OUT),)
    if flip == "mean":
        np.testing.assert_allclose(apart.sum(axis=0), result.scores, rtol=1e-9)


def test_a_step_depends_on_no_other_and_not_on_how_the_work_is_cut(
    model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, both = fitted(journey(), model, tmp_path).step_scores(JOURNEY)
    _, alone = fitted(journey(timesteps=[249]), model, tmp_path).step_scores(JOURNEY)
    np.testing.assert_allclose(alone[0], both[1], rtol=1e-9)
    monkeypatch.setattr(module, "_GRADIENT_BYTES", 1)
    _, cut = fitted(journey(batch_size=2), model, tmp_path / "cut").step_scores(JOURNEY)
    np.testing.assert_allclose(cut, both, rtol=1e-6)
    _, reseeded = fitted(journey(seed=1), model, tmp_path).step_scores(JOURNEY)
    assert not np.allclose(reseeded, both, rtol=1e-3)


def test_steps_are_spread_over_the_trajectory() -> None:
    assert list(journey(timesteps=None, steps=1).query_steps(JOURNEY)) == [999]
    assert list(journey(timesteps=None, steps=2).query_steps(JOURNEY)) == [999, 249]
    assert list(journey(timesteps=None, steps=10).query_steps(JOURNEY)) == list(STEPS)
    long = replace(JOURNEY, trajectory=Trajectory(tuple(range(999, 0, -20)), torch.zeros(50, 4, 4, 4)))
    assert list(journey(timesteps=None, steps=3).query_steps(long)) == [999, 519, 19]


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"Query 'query' has no sampling trajectory.*draw the query from its prompt"):
        journey().check([JOURNEY, QUERY])
    with pytest.raises(ValueError, match=r"not sampled at timestep 500: choose timesteps from 999, 749, 499, 249"):
        journey(timesteps=[249, 500]).check([JOURNEY])
    journey().check([JOURNEY])
    with pytest.raises(ValueError, match=r"timesteps must be different ones.*given \[249, 249\]"):
        journey(timesteps=[249, 249])
    with pytest.raises(ValueError, match=r"timesteps must be different ones"):
        journey(timesteps=[])
    with pytest.raises(ValueError, match="resamplings must be at least 1; given 0"):
        journey(resamplings=0)
    with pytest.raises(ValueError, match="to 20 numbers is too small"):
        journey(projection=Projection(20))
    with pytest.raises(ValueError, match="noise_samples must be at least 1; given 0"):
        LossSamples(noise_samples=0)


def test_images_draw_their_own_timesteps_and_one_caption() -> None:
    data = tiny_latents(200, captions=3)
    losses = LossSamples(noise_samples=5).of(tiny_model(), data, 16)
    image, item = torch.arange(200).repeat_interleave(10), torch.arange(10).repeat(200)
    caption, timestep, keys = losses.noise_samples(image, item)
    assert all(len(set(row)) == 1 for row in caption.reshape(200, 10).tolist()), "one caption an image"
    counts = torch.bincount(losses.caption_of, minlength=3)
    assert int((counts - 200 / 3).abs().max()) < 4 * (200 * 2 / 9) ** 0.5
    # Uniform over 1000 timesteps: mean 499.5, spread 288.7.
    assert abs(float(timestep.double().mean()) - 499.5) < 4 * 288.7 / 2000**0.5
    assert float(timestep.double().std()) == pytest.approx(288.7, rel=0.05)
    assert len(set(keys.tolist())) == 2000
    # Nothing depends on the other images.
    part = data.subset([7, 3])
    alone = LossSamples(noise_samples=5).of(tiny_model(), part, 16)
    for result, whole in zip(
        alone.noise_samples(torch.zeros(10, dtype=torch.int64), item[:10]),
        losses.noise_samples(torch.full((10,), 7), item[:10]),
        strict=True,
    ):
        assert torch.equal(result, whole)


def test_the_command_line_draws_what_it_needs(tmp_path: Path) -> None:
    attributor = {
        "class_path": "JourneyTRAK",
        "init_args": {"projection": {"dimension": 128}, "grid": {"noise_samples": 1}, "steps": 2, "resamplings": 2},
    }
    config = attribution_config(tmp_path, attributor=attributor)
    evaluate.main(["attribute", "-c", str(config)])
    ((ids, scores),) = read_ranking(tmp_path / "run").values()
    assert len(ids) == 16
    assert np.isfinite(scores).all()
    assert len(set(scores)) == 16
    Image.new("RGB", (8, 8)).save(tmp_path / "file.png")
    queries = {"images": [{"file": str(tmp_path / "file.png"), "prompt": "red"}]}
    other = attribution_config(tmp_path, "files", attributor=attributor, queries=queries)
    before = sorted((tmp_path / "store").rglob("*"))
    with pytest.raises(ValueError, match=r"Query 'file-\w+' has no sampling trajectory"):
        evaluate.main(["attribute", "-c", str(other)])
    assert sorted((tmp_path / "store").rglob("*")) == before
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["identity"]["attributor"]["steps"] == 2
