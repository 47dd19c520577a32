"""Each prediction's loss against its formula, written out here from the parts that diffusers loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor

from tests.support.pipelines import (
    pixart,
    pixart_transformer,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    tiny_vae_of,
    unet_with,
)
from wherefrom.data.encoded_images import encode_image_set
from wherefrom.data.image_set import ImageSet
from wherefrom.models.conditioning import POOLED, PROMPT, Conditioning, prompt_embeddings
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.noise_schedule import FlowSchedule, noise_schedule_of
from wherefrom.models.pipeline import load_model, load_pipeline, model_from_pipeline, save_pipeline
from wherefrom.models.sampling import sample
from wherefrom.runtime.artifacts import Store

PROMPTS = ["a big red square", ""]
TIMES = torch.tensor([0, 400])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LATENTS, NOISE = randn(2, 4, 4, 4, seed=1), randn(2, 4, 4, 4, seed=2)


def losses(model: DiffusionModel) -> Tensor:
    assert model.encoder is not None
    result = model.losses(LATENTS, model.encoder.text.encode(PROMPTS), TIMES, NOISE)
    assert result.dtype == torch.float64
    return result


def alphas(kind: str) -> Tensor:
    linear = np.linspace(1e-4, 0.02, 1000)
    scaled = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return torch.tensor(np.cumprod(1 - (linear if kind == "linear" else scaled)))


def diffused(index: int, kind: str) -> tuple[Tensor, Tensor]:
    """√ᾱ and √(1 - ᾱ) of one example."""
    alpha = alphas(kind)[TIMES[index]]
    return alpha.sqrt(), (1 - alpha).sqrt()


def clip(pipeline: Any, suffix: str, prompt: str) -> Any:
    tokenizer, model = getattr(pipeline, f"tokenizer{suffix}"), getattr(pipeline, f"text_encoder{suffix}")
    numbers = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return model(numbers, output_hidden_states=True)


@pytest.mark.parametrize("version", [1, 2])
def test_stable_diffusion(tmp_path: Path, version: int) -> None:
    pipeline: Any = load_pipeline(str(stable_diffusion(tmp_path, version)), torch.float64)
    result = losses(model_from_pipeline(pipeline))
    for index, prompt in enumerate(PROMPTS):
        signal, spread = diffused(index, "scaled")
        noisy = signal * LATENTS[index] + spread * NOISE[index]
        states = clip(pipeline, "", prompt).last_hidden_state
        output = pipeline.unet(noisy[None], TIMES[index], encoder_hidden_states=states).sample[0]
        target = NOISE[index] if version == 1 else signal * NOISE[index] - spread * LATENTS[index]
        # Schedules come from diffusers in single precision.
        torch.testing.assert_close(result[index], (target - output).square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl(tmp_path: Path, zeros: bool) -> None:
    folder = stable_diffusion_xl(tmp_path, force_zeros_for_empty_prompt=zeros)
    pipeline: Any = load_pipeline(str(folder), torch.float64)
    result = losses(model_from_pipeline(pipeline))
    for index, prompt in enumerate(PROMPTS):
        signal, spread = diffused(index, "scaled")
        first, second = clip(pipeline, "", prompt), clip(pipeline, "_2", prompt)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        pooled = second.text_embeds
        if zeros and not prompt:
            states, pooled = torch.zeros_like(states), torch.zeros_like(pooled)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]], dtype=torch.float64)}
        noisy = (signal * LATENTS[index] + spread * NOISE[index])[None]
        output = pipeline.unet(noisy, TIMES[index], encoder_hidden_states=states, added_cond_kwargs=added).sample[0]
        torch.testing.assert_close(result[index], (NOISE[index] - output).square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("sized", [False, True])
def test_pixart(tmp_path: Path, sized: bool) -> None:
    network = pixart_transformer(use_additional_conditions=sized)
    if sized:  # a width that three embeddings of the size fill
        network = pixart_transformer(use_additional_conditions=True, attention_head_dim=12, cross_attention_dim=24)
    pipeline: Any = load_pipeline(str(pixart(tmp_path, transformer=network)), torch.float64)
    result = losses(model_from_pipeline(pipeline))
    for index, prompt in enumerate(PROMPTS):
        signal, spread = diffused(index, "linear")
        tokens = pipeline.tokenizer(prompt, padding="max_length", max_length=120, return_tensors="pt")
        assert 0 < int(tokens.attention_mask.sum()) < 120
        states = pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if sized:
            added = {"resolution": torch.tensor([[8.0, 8.0]]), "aspect_ratio": torch.tensor([[1.0]])}
        output = pipeline.transformer(
            (signal * LATENTS[index] + spread * NOISE[index])[None],
            encoder_hidden_states=states,
            encoder_attention_mask=tokens.attention_mask.double(),
            timestep=TIMES[index][None],
            added_cond_kwargs=added,
        ).sample[0]
        assert output.shape[0] == 8
        torch.testing.assert_close(result[index], (NOISE[index] - output[:4]).square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("t5", [True, False])
def test_stable_diffusion_3(tmp_path: Path, t5: bool) -> None:
    pipeline: Any = load_pipeline(str(stable_diffusion_3(tmp_path, t5)), torch.float64)
    result = losses(model_from_pipeline(pipeline))
    for index, prompt in enumerate(PROMPTS):
        even = (float(TIMES[index]) + 1) / 1000
        level = 3 * even / (1 + 2 * even)
        first, second = clip(pipeline, "", prompt), clip(pipeline, "_2", prompt)
        states = torch.zeros(1, 77 + 256, 24, dtype=torch.float64)
        states[:, :77, :20] = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        if t5:
            numbers = pipeline.tokenizer_3(prompt, padding="max_length", max_length=256, return_tensors="pt").input_ids
            states[:, 77:] = pipeline.text_encoder_3(numbers)[0]
        output = pipeline.transformer(
            ((1 - level) * LATENTS[index] + level * NOISE[index])[None],
            encoder_hidden_states=states,
            pooled_projections=torch.cat([first.text_embeds, second.text_embeds], dim=-1),
            timestep=torch.tensor([level * 1000]),
        ).sample[0]
        expected = (NOISE[index] - LATENTS[index] - output).square().mean()
        torch.testing.assert_close(result[index], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("save", [stable_diffusion_xl, pixart, stable_diffusion_3])
def test_each_loss_is_its_own_examples(tmp_path: Path, save: Callable[[Path], Path]) -> None:
    model = load_model(str(save(tmp_path)), torch.float64)
    assert model.encoder is not None
    conditioning = model.encoder.text.encode(PROMPTS)
    alone = [model.losses(LATENTS[row], conditioning.at(row), TIMES[row], NOISE[row]) for row in ([0], [1])]
    torch.testing.assert_close(losses(model), torch.cat(alone), rtol=1e-9, atol=0)
    assert not torch.equal(*model.encoder.text.encode(["red", "a red"])[PROMPT])


def test_noise_levels_are_the_schedulers_and_sampling_leaves_them_alone() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    fresh = FlowSchedule(scheduler)
    assert fresh.steps == 1000
    assert float(fresh.spread[-1]) == 1.0
    assert float(fresh.times(torch.tensor([999]))) == 1000.0
    scheduler.set_timesteps(5)
    assert torch.equal(FlowSchedule(scheduler).spread, fresh.spread)
    assert (fresh.spread.diff() > 0).all()
    path = fresh.sampler(5).path
    assert path[0] == (999, 1000.0)
    for timestep, time in path:
        gap = float((fresh.spread[timestep] * 1000 - time).abs())
        assert gap <= float((fresh.spread * 1000 - time).abs().min()) + 1e-3


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting = True is not supported"),
        (DDPMScheduler(prediction_type="sample"), "prediction_type 'sample' is not supported"),
    ],
)
def test_other_schedules_are_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_schedule_of(scheduler)


def test_flow_matching_needs_its_scheduler_and_adds_no_noise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DDPMScheduler is not supported: flow matching needs"):
        FlowSchedule(DDPMScheduler())
    model = load_model(str(stable_diffusion_3(tmp_path)), torch.float64)
    conditioning = Conditioning({PROMPT: torch.zeros(1, 77 + 256, 24), POOLED: torch.zeros(1, 16)})
    with pytest.raises(ValueError, match="eta must be 0"):
        sample(
            model,
            conditioning=conditioning,
            empty=conditioning.at(0),
            keys=torch.tensor([1]),
            shape=(4, 4, 4),
            steps=2,
            eta=0.5,
        )


@pytest.mark.parametrize(
    ("save", "parts", "message"),
    [
        (stable_diffusion, {"tokenizer": None}, "missing its tokenizer; it has vae, text_encoder, unet"),
        (stable_diffusion_xl, {"text_encoder": None, "tokenizer": None}, "missing its text_encoder and tokenizer"),
        (stable_diffusion_3, {"text_encoder_2": None}, "missing its text_encoder_2"),
        (pixart, {"text_encoder": None}, "missing its text_encoder"),
        (stable_diffusion, {"vae": tiny_vae_of(3)}, "takes 4 channels and its autoencoder gives 3"),
        (stable_diffusion, {"unet": unet_with(class_embed_type="timestep")}, "class_embed_type 'timestep'"),
        (
            stable_diffusion,
            {
                "unet": unet_with(
                    down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, mid_block_type=None
                )
            },
            "no cross-attention, so it cannot read captions",
        ),
    ],
)
def test_pipelines_that_cannot_be_attributed_are_refused(
    tmp_path: Path, save: Callable[..., Path], parts: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(str(save(tmp_path, **parts)))


def test_an_unconditional_pipeline_is_refused() -> None:
    network = UNet2DModel(sample_size=8, block_out_channels=(32,) * 4)
    with pytest.raises(ValueError, match="DDPMPipeline is not supported: A U-Net of Stable Diffusion"):
        model_from_pipeline(DDPMPipeline(network, DDPMScheduler()))


def test_latents_and_states_of_another_model_are_refused(tmp_path: Path) -> None:
    unet = load_model(str(stable_diffusion(tmp_path / "sd")))
    with pytest.raises(ValueError, match="latents have 16 channels, but the model takes 4"):
        unet.check(torch.zeros(16, 4, 4), prompt_embeddings(torch.zeros(77, 12)))
    with pytest.raises(ValueError, match="embeddings are 16 wide, but the model takes 12"):
        unet.check(torch.zeros(4, 4, 4), prompt_embeddings(torch.zeros(77, 16)))
    unet.check(torch.zeros(4, 6, 4), prompt_embeddings(torch.zeros(77, 12)))
    transformer = load_model(str(stable_diffusion_3(tmp_path / "sd3")))
    conditioning = Conditioning({PROMPT: torch.zeros(333, 24), POOLED: torch.zeros(16)})
    for sides in ((4, 5), (18, 4)):
        with pytest.raises(ValueError, match="must be multiples of 2, the side of a patch, and no more than 16"):
            transformer.check(torch.zeros(4, *sides), conditioning)
    transformer.check(torch.zeros(4, 6, 4), conditioning)


def test_what_can_only_be_read_is_not_saved(tmp_path: Path) -> None:
    model = load_model(str(stable_diffusion_xl(tmp_path / "xl")))
    with pytest.raises(ValueError, match="UNet2DConditionModel cannot be saved"):
        save_pipeline(tmp_path / "again", model, "nowhere")


def test_the_size_condition_of_sdxl_is_the_images(tmp_path: Path) -> None:
    encoder = load_model(str(stable_diffusion_xl(tmp_path / "xl"))).encoder
    assert encoder is not None
    before = encoder.text.encode(["red"])
    assert before["time_ids"][0].tolist() == [8, 8, 0, 0, 8, 8]
    identity = encoder.identity()
    random = np.random.default_rng(0).integers(0, 255, (2, 16, 24, 3), dtype=np.uint8)
    train = ImageSet(("a", "b"), (("red",), ("blue",)), random, {"license": ("", "")}, "wide")
    made = encode_image_set(train, encoder=encoder, store=Store(tmp_path / "store"))
    conditioning = made.conditioning_at(torch.arange(2), 0)
    assert conditioning["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    torch.testing.assert_close(conditioning[PROMPT][:1], before[PROMPT])
    assert encoder.identity() != identity
