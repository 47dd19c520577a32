"""What makes passes faster or smaller leaves rankings as they are, on the emoji world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from scipy.stats import spearmanr

from datamodules import Emoji
from tests.support.tiny import one_process, tiny_encoder, tiny_latents, tiny_model
from wherefrom.attributors import AttributionByUnlearning, Query, TrainingData
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings
from wherefrom.curvature import EKFAC, FisherSettings
from wherefrom.data.emoji import EmojiOptions
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.models.conditioning import prompt_embeddings
from wherefrom.models.diffusion import DiffusionModel, with_output
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import generate
from wherefrom.runtime.artifacts import Store

WEIGHTS = str(Path(__file__).parents[2] / "weights" / "emoji_1k")
PROMPT = "house, openmoji style"
BATCH = 128  # few shapes to compile for


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    """A tenth of emoji-1k's images."""
    module = Emoji(EmojiOptions(concepts=(0.0, 0.032)), store=str(tmp_path_factory.mktemp("store")))
    module.encoder = load_model(WEIGHTS).encoder
    module.prepare_data()
    module.setup()
    first = range(96)
    return TrainingData(module.train_images.subset(first), module.train_latents.subset(first))


@pytest.fixture(scope="module")
def query(data: TrainingData) -> Query:
    """An image of the model's own."""
    (made,) = generate(load_model(WEIGHTS), prompts=[PROMPT], seed=0, shape=(4, 8, 8), sampling_steps=20)
    return made


def scores(model: DiffusionModel, data: TrainingData, query: Query, folder: Path, increase: float = 0.2) -> np.ndarray:
    method = AttributionByUnlearning(
        unlearning=UnlearningSettings(noise_samples=128, measurement_samples=128, relative_loss_increase=increase),
        grid=LossGrid(timesteps=4, flips=False),
        curvature=EKFAC(FisherSettings(samples_per_image=1)),
        batch_size=BATCH,
    )
    method.fit(data, model, Store(folder), one_process())
    (result,) = method.score([query])
    return result.scores


@pytest.fixture(scope="module")
def plain(data: TrainingData, query: Query, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Scores in float32, not compiled."""
    return scores(load_model(WEIGHTS), data, query, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("option", ["bf16", "checkpoint"])
def test_rankings_stay(option: str, data: TrainingData, query: Query, plain: np.ndarray, tmp_path: Path) -> None:
    model = load_model(WEIGHTS).accelerate(**{option: True})
    result = scores(model, data, query, tmp_path)
    agreement = float(spearmanr(result, plain).statistic)
    assert agreement >= 0.99
    if option == "bf16":
        assert not np.array_equal(result, plain), "it was computed in another precision"
    else:
        np.testing.assert_allclose(result, plain, rtol=0.02, atol=0.02 * np.abs(plain).max())


def test_rankings_stay_when_compiled(tmp_path: Path) -> None:
    # One level and few channels: compiling takes as long as a network has kinds of layers. In double precision, so
    # that nothing but a fault can show.
    data, encoder = tiny_latents(40), tiny_encoder(tmp_path / "text")
    latent = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    query = Query("query", "a big red square", np.zeros((8, 8, 3), np.uint8), latent)
    training = TrainingData(data.images, data)
    results = []
    for compile in (False, True):
        model = tiny_model(encoder=encoder, channels=(8,)).accelerate(compile=compile)
        results.append(scores(model, training, query, tmp_path / str(compile), increase=0.01))
        assert (model.compiled is not None) == compile
    assert float(spearmanr(*results).statistic) >= 0.99
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6, atol=1e-6 * np.abs(results[0]).max())


def test_bfloat16_is_another_model_to_the_store_and_keeps_its_weights() -> None:
    model, other = tiny_model(), tiny_model().accelerate(bf16=True)
    assert model.fingerprint() != other.fingerprint()
    assert other.dtype == model.dtype
    assert with_output(other, "square_output").bf16


def test_what_cannot_checkpoint_is_refused() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

    with pytest.raises(ValueError, match="Plain cannot checkpoint gradients"):
        DiffusionModel(Plain(), tiny_model().noise_schedule).accelerate(checkpoint=True)


def test_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpoint in (False, True):
        model = tiny_model().accelerate(checkpoint=checkpoint)
        assert isinstance(model.denoiser, UNet2DConditionModel)
        model.denoiser.requires_grad_(True)
        latents = torch.ones(2, 4, 4, 4).to(model.dtype)
        conditioning = prompt_embeddings(torch.ones(2, 5, 12).to(model.dtype))
        model.losses(latents, conditioning, torch.tensor([10, 500]), torch.ones_like(latents)).sum().backward()
        gradients.append(
            torch.cat([each.grad.flatten() for each in model.denoiser.parameters() if each.grad is not None])
        )
    torch.testing.assert_close(gradients[0], gradients[1])
