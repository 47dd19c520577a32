"""The loss and the sampler against their formulas, and against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from tests.support.tiny import LENGTH, moved_copy, text_folder, tiny_encoder, tiny_model, tiny_pipeline, tiny_schedule
from wherefrom.models.conditioning import prompt_embeddings
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.noise_schedule import FlowSchedule, NoiseSchedule
from wherefrom.models.pipeline import load_model, load_pipeline, model_from_pipeline, save_pipeline
from wherefrom.models.sampling import sample
from wherefrom.runtime import keyed_random

START, STEP = 101, 102  # the salts of the sampler's draws
SHAPE = (4, 4, 4)
KEYS = keyed_random.hash_texts(["a", "b", "c"])


def states_of(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, LENGTH, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NULL = states_of(1, seed=1)[0]
EMPTY = prompt_embeddings(NULL)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_formula(prediction: str) -> None:
    model = tiny_model(prediction=prediction)
    latents, noise, timesteps = randn(3, *SHAPE, seed=2), randn(3, *SHAPE, seed=3), torch.tensor([0, 500, 999])
    result = model.losses(latents, states_of(3), timesteps, noise)
    betas = np.linspace(1e-4, 0.02, 1000)
    alphas = np.cumprod(1 - betas)
    assert result.shape == (3,)
    for index, timestep in enumerate(timesteps.tolist()):
        signal, spread = np.sqrt(alphas[timestep]), np.sqrt(1 - alphas[timestep])
        noisy = signal * latents[index] + spread * noise[index]
        output = model.denoiser(noisy[None], timestep, encoder_hidden_states=states_of(3)[index : index + 1]).sample[0]
        target = noise[index] if prediction == "epsilon" else signal * noise[index] - spread * latents[index]
        # The schedule comes from diffusers in single precision.
        torch.testing.assert_close(result[index], (target - output).square().mean(), rtol=1e-4, atol=0)


def test_other_schedulers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prediction_type 'sample' is not supported"):
        tiny_schedule("sample")
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler"):
        NoiseSchedule(FlowMatchEulerDiscreteScheduler())


def by_hand(model: DiffusionModel, states: Tensor, steps: int, guidance: float, eta: float) -> Tensor:
    """DDIM (Song et al., equation 12) from the keyed noise of `KEYS`, one image at a time."""
    alphas = model.noise_schedule.signal.square()
    timesteps = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
    drawn = []
    for key, state in zip(KEYS, states, strict=False):
        x = keyed_random.normal(keyed_random.combine(START, key)[None], SHAPE, torch.float64)
        for index, timestep in enumerate(timesteps):
            with_prompt, without = (
                model.denoiser(x, timestep, encoder_hidden_states=condition[None]).sample for condition in (state, NULL)
            )
            output = without + guidance * (with_prompt - without)
            now = alphas[timestep]
            before = alphas[timestep - 1000 // steps] if timestep >= 1000 // steps else torch.tensor(1.0)
            if model.noise_schedule.prediction == "epsilon":
                noise, clean = output, (x - (1 - now).sqrt() * output) / now.sqrt()
            else:
                noise, clean = now.sqrt() * output + (1 - now).sqrt() * x, now.sqrt() * x - (1 - now).sqrt() * output
            sigma = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
            x = before.sqrt() * clean + (1 - before - sigma**2).clamp(min=0).sqrt() * noise
            x = x + sigma * keyed_random.normal(keyed_random.combine(STEP, key, index)[None], SHAPE, torch.float64)
        drawn.append(x[0])
    return torch.stack(drawn)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("guidance", "eta"), [(1.0, 0.0), (3.0, 0.0), (2.0, 1.0), (1.0, 0.5)])
@torch.no_grad()
def test_sampling_is_ddim(prediction: str, guidance: float, eta: float) -> None:
    model, states = tiny_model(prediction=prediction), states_of(3)
    result = sample(
        model,
        conditioning=prompt_embeddings(states),
        empty=EMPTY,
        keys=KEYS,
        shape=SHAPE,
        steps=4,
        guidance=guidance,
        eta=eta,
    )
    expected = by_hand(model, states, 4, guidance, eta)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_depends_on_its_key_and_not_on_its_batch(eta: float, guidance: float) -> None:
    model, states = tiny_model(), states_of(3)

    def draw(rows: list[int], seed: int = 0) -> Tensor:
        keys = keyed_random.combine(seed, KEYS[rows])
        return sample(
            model,
            conditioning=prompt_embeddings(states[rows]),
            empty=EMPTY,
            keys=keys,
            shape=SHAPE,
            steps=3,
            guidance=guidance,
            eta=eta,
        )

    whole = draw([0, 1, 2])
    assert torch.equal(draw([0, 1, 2]), whole)
    for index in range(3):
        torch.testing.assert_close(draw([index])[0], whole[index], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(draw([2, 0]), whole[[2, 0]], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(draw([0, 1, 2], seed=1), whole, atol=0.1)


def test_without_guidance_the_empty_prompt_is_not_asked() -> None:
    broken = torch.full_like(NULL, float("nan"))
    result = sample(
        tiny_model(),
        conditioning=prompt_embeddings(states_of(2)),
        empty=prompt_embeddings(broken),
        keys=KEYS[:2],
        shape=SHAPE,
        steps=2,
        guidance=1.0,
    )
    assert torch.isfinite(result).all()


def test_progress_counts_the_steps() -> None:
    calls: list[tuple[int, int]] = []
    sample(
        tiny_model(),
        conditioning=prompt_embeddings(states_of(1)),
        empty=EMPTY,
        keys=KEYS[:1],
        shape=SHAPE,
        steps=3,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_the_fingerprint_is_that_of_weights_and_process() -> None:
    model = tiny_model()
    prints = {
        model.fingerprint(),
        moved_copy(model, 1e-12).fingerprint(),
        tiny_model(prediction="epsilon").fingerprint(),
        tiny_model(dtype=torch.float32).fingerprint(),
        DiffusionModel(model.denoiser, NoiseSchedule(DDPMScheduler(beta_end=0.03))).fingerprint(),
    }
    assert len(prints) == 4 + 1
    assert tiny_model().fingerprint() == model.fingerprint()


def test_a_fingerprint_is_the_same_on_machines_that_round_differently() -> None:
    model, scheduler = tiny_model(), DDPMScheduler(prediction_type="v_prediction")
    expected = DiffusionModel(model.denoiser, NoiseSchedule(scheduler)).fingerprint()
    scheduler.alphas_cumprod = torch.nextafter(scheduler.alphas_cumprod, torch.ones(()))
    assert DiffusionModel(model.denoiser, NoiseSchedule(scheduler)).fingerprint() == expected
    others = [PNDMScheduler(prediction_type="v_prediction"), DDIMScheduler(prediction_type="v_prediction")]
    assert {DiffusionModel(model.denoiser, NoiseSchedule(each)).fingerprint() for each in others} == {expected}
    flows = [FlowSchedule(FlowMatchEulerDiscreteScheduler(shift=shift)) for shift in (1.0, 3.0)]
    assert len({DiffusionModel(model.denoiser, each).fingerprint() for each in flows}) == 2


def test_a_pipeline_comes_back_from_its_folder(tmp_path: Path) -> None:
    encoder = tiny_encoder(text_folder(tmp_path / "saved"))
    model = tiny_model(dtype=torch.float32, encoder=encoder)
    for dtype, exact in ((torch.float32, True), (torch.float16, False)):
        folder = tmp_path / str(dtype)
        save_pipeline(folder, model, str(text_folder(tmp_path / "saved")), dtype)
        loaded = load_model(str(folder))
        assert loaded.dtype == torch.float32
        assert loaded.noise_schedule.prediction == "v_prediction"
        torch.testing.assert_close(loaded.noise_schedule.signal, model.noise_schedule.signal, rtol=0, atol=0)
        assert loaded.encoder is not None
        assert loaded.encoder.text.length == LENGTH
        assert loaded.encoder.text.identity() == encoder.text.identity()
        if exact:
            assert loaded.fingerprint() == model.fingerprint()
            assert loaded.encoder.identity() == encoder.identity()
        for name, value in model.denoiser.state_dict().items():
            torch.testing.assert_close(loaded.denoiser.state_dict()[name], value.to(dtype).float(), rtol=0, atol=0)
        assert not any(parameter.requires_grad for parameter in loaded.denoiser.parameters())
    assert model.dtype == torch.float32
    with pytest.raises(ValueError, match=r"A pipeline needs an encoder"):
        save_pipeline(tmp_path / "none", tiny_model(), "nowhere")


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_diffusers_own_pipeline_draws_the_same_image(tmp_path: Path, guidance: float) -> None:
    pipeline = load_pipeline(str(tiny_pipeline(tmp_path / "model")))
    assert isinstance(pipeline, StableDiffusionPipeline)
    pipeline.set_progress_bar_config(disable=True)
    model = model_from_pipeline(pipeline)
    assert model.encoder is not None
    prompt = "a big red square"
    text = model.encoder.text
    latents = sample(
        model,
        conditioning=text.encode([prompt]),
        empty=text.encode([""]).at(0),
        keys=KEYS[:1],
        shape=SHAPE,
        steps=5,
        guidance=guidance,
    )
    start = keyed_random.normal(keyed_random.combine(START, KEYS[:1]), SHAPE)
    theirs = pipeline(
        prompt, num_inference_steps=5, guidance_scale=guidance, latents=start, output_type="latent"
    ).images
    torch.testing.assert_close(latents, theirs, rtol=1e-4, atol=1e-4)
    pixels = pipeline(prompt, num_inference_steps=5, guidance_scale=guidance, latents=start, output_type="np").images
    ours = model.encoder.decode_images(latents)
    assert ours.shape == (1, 8, 8, 3)
    assert np.abs(ours / 255.0 - pixels).max() < 0.5 / 255 + 1e-3
    assert np.ptp(ours) > 20


def test_a_pipeline_of_another_kind_is_refused() -> None:
    pipeline = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(sample_size=8, block_out_channels=(32,) * 4), DDPMScheduler()
    )
    with pytest.raises(ValueError, match=r"DDPMPipeline is not supported: .*it has unet, scheduler"):
        model_from_pipeline(pipeline)


def test_a_pipeline_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing.*neither a valid local path nor a valid repo id"):
        load_model(str(tmp_path / "nothing"))
