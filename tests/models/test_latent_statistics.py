"""Autoencoders with a mean and a deviation of each channel: latents by the formula of diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler

from tests.support.pipelines import TRAINED, images, pixart, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from tests.support.tiny import tiny_vae
from wherefrom.data.encoded_images import encode_image_set
from wherefrom.models.encoders import LatentEncoder
from wherefrom.models.pipeline import load_model, load_pipeline, model_from_pipeline
from wherefrom.runtime.artifacts import Store

MEAN, DEVIATION = [-1.6, 1.3, 0.4, -0.6], [8.4, 5.5, 3.5, 0.7]


def vae_with(**settings: Any) -> AutoencoderKL:
    config = {name: value for name, value in tiny_vae().config.items() if name != "_use_default_values"}
    vae = AutoencoderKL.from_config({**config, "scaling_factor": 0.5, **settings})
    vae.load_state_dict(tiny_vae().state_dict())
    return vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vae = vae_with(latents_mean=MEAN, latents_std=DEVIATION)
    scheduler = DDIMScheduler(**TRAINED, steps_offset=1, clip_sample=False)
    return stable_diffusion_xl(tmp_path_factory.mktemp("playground"), vae=vae, scheduler=scheduler)


def test_latents_are_normalized_and_the_pipeline_draws_what_we_decode(folder: Path) -> None:
    pipeline: Any = load_pipeline(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    encoder = model_from_pipeline(pipeline).encoder
    assert encoder is not None
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encoder.encode_pixels(pixels)
    with torch.no_grad():
        raw = pipeline.vae.encode(pixels).latent_dist.mean.double()
    mean, deviation = (torch.tensor(each, dtype=torch.float64).reshape(1, 4, 1, 1) for each in (MEAN, DEVIATION))
    torch.testing.assert_close(latents.double(), (raw - mean) * 0.5 / deviation, rtol=1e-5, atol=1e-6)
    drawn = []  # what the pipeline decodes, which are the latents at its last step

    def keep(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        drawn.append(values["latents"].clone())
        return values

    picture = pipeline(
        "stripes",
        num_inference_steps=2,
        height=8,
        width=8,
        output_type="np",
        callback_on_step_end=keep,
        generator=torch.Generator().manual_seed(1),
    ).images
    assert np.abs(encoder.decode_images(drawn[-1]) / 255.0 - picture).max() < 1 / 255
    round_trip = encoder.decode(latents)
    with torch.no_grad():
        torch.testing.assert_close(
            round_trip, pipeline.vae.decode(raw.float()).sample.clamp(-1, 1), rtol=1e-3, atol=1e-4
        )


def test_they_are_part_of_identities_only_where_they_are(folder: Path, tmp_path: Path) -> None:
    plain = LatentEncoder(vae_with(), load_model(str(stable_diffusion(tmp_path))).encoder.text)  # type: ignore[union-attr]
    other = LatentEncoder(vae_with(latents_mean=MEAN, latents_std=DEVIATION), plain.text)
    assert other.identity() == {**plain.identity(), "statistics": [MEAN, DEVIATION]}
    assert other.decoder_identity() != plain.decoder_identity()
    store, train = Store(tmp_path / "store"), images(2)
    made = [encode_image_set(train, encoder=each, store=store) for each in (plain, other)]
    first, second = (each.latents_at(torch.arange(2), torch.zeros(2).long()) for each in made)
    mean, deviation = (torch.tensor(each).reshape(1, 4, 1, 1) for each in (MEAN, DEVIATION))
    torch.testing.assert_close(second, (first - 0.5 * mean) / deviation)


@pytest.mark.parametrize(
    "settings",
    [
        {"latents_mean": MEAN},
        {"latents_std": DEVIATION},
        {"latents_mean": MEAN[:3], "latents_std": DEVIATION[:3]},
        {"latents_mean": MEAN, "latents_std": [1.0, 1.0, 0.0, 1.0]},
        {"latents_mean": MEAN, "latents_std": DEVIATION, "shift_factor": 0.1},
    ],
)
def test_half_of_them_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needed are both, 4 numbers each, deviations above 0, and no shift_factor"):
        load_model(str(stable_diffusion_xl(tmp_path, vae=vae_with(**settings))))


@pytest.mark.parametrize("save", [stable_diffusion, stable_diffusion_3, pixart])
def test_where_the_pipeline_leaves_them_out_they_are_refused(tmp_path: Path, save: Any) -> None:
    vae = vae_with(latents_mean=MEAN, latents_std=DEVIATION)
    with pytest.raises(ValueError, match=r"The autoencoder has latents_mean = .* leaves it out when it draws"):
        load_model(str(save(tmp_path, vae=vae)))


def test_tiles_are_refused_where_they_would_be_made(tmp_path: Path) -> None:
    encoder = load_model(str(stable_diffusion(tmp_path))).encoder
    assert encoder is not None
    small, large = torch.zeros(1, 3, 8, 8), torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)
    expected, before = encoder.encode_pixels(small), encoder.encode_pixels(large)
    vae: Any = encoder.vae
    vae.enable_tiling()
    assert torch.equal(encoder.encode_pixels(small), expected)
    with pytest.raises(ValueError, match=r"encodes in tiles of 8 pixels.*disable_tiling"):
        encoder.encode_pixels(large)
    with pytest.raises(ValueError, match=r"decodes in tiles of 4.*disable_tiling"):
        encoder.decode(torch.zeros(1, 4, 8, 8))
    vae.disable_tiling()
    vae.enable_slicing()
    assert torch.equal(encoder.encode_pixels(large), before)
