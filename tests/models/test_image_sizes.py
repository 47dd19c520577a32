"""Sizes of images and latents: the reduction of every autoencoder, the model's own size, and what it can take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, AutoencoderTiny

from tests.support import pipelines
from wherefrom.models.image_sizes import latent_shape_of, latent_sides, own_size, reduction_of, size_step
from wherefrom.models.pipeline import load_model

SMALL: dict[str, Any] = {"norm_num_groups": 1, "latent_channels": 4}
AUTOENCODERS = [
    lambda: AutoencoderKL(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        **SMALL,
    ),
    lambda: AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ),
    lambda: AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(4, 4),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(4, 4),
        **SMALL,
    ),
    lambda: AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(4, 4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4, 4),
        encoder_layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        encoder_qkv_multiscales=((),) * 5,
        decoder_qkv_multiscales=((),) * 5,
    ),
]


@pytest.mark.parametrize("make", AUTOENCODERS, ids=["KL", "tiny", "asymmetric", "DC"])
@torch.no_grad()
def test_the_reduction_is_what_the_encoder_does(make: Any) -> None:
    autoencoder = make()
    encoded = autoencoder.encode(torch.zeros(1, 3, 64, 32))
    latent = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded[0]
    factor = reduction_of(autoencoder)
    assert factor > 1
    assert latent.shape[2:] == (64 // factor, 32 // factor)


def test_an_unknown_reduction_or_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not say by how much it reduces"):
        reduction_of(SimpleNamespace(config={"latent_channels": 4}))
    assert reduction_of(SimpleNamespace(config={}, spatial_compression_ratio=16)) == 16
    with pytest.raises(ValueError, match=r"does not say which size its images have: give one in the option 'size'"):
        latent_sides(SimpleNamespace(config=SimpleNamespace(sample_size=None)))
    assert latent_sides(SimpleNamespace(config=SimpleNamespace(sample_size=[4, 6]))) == (4, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def test_a_unet_takes_any_multiple_of_the_reduction(folder: Path) -> None:
    model = load_model(str(pipelines.stable_diffusion(folder / "sd")))
    assert (own_size(model), size_step(model)) == ((8, 8), 2)
    assert latent_shape_of(model, (12, 22)) == (4, 6, 11)
    with pytest.raises(ValueError, match=r"images of 7 × 8 pixels do not suit .* multiples of 2"):
        latent_shape_of(model, (8, 7))


def test_a_transformer_takes_whole_patches_within_its_positions(folder: Path) -> None:
    model = load_model(str(pipelines.stable_diffusion_3(folder / "sd3", t5=False)))
    assert size_step(model) == 4
    assert latent_shape_of(model, (32, 4)) == (4, 16, 2)
    with pytest.raises(ValueError, match=r"images of 8 × 6 pixels do not suit .* multiples of 4"):
        latent_shape_of(model, (6, 8))
    with pytest.raises(ValueError, match=r"^size: images of 4 × 36 pixels .* no more than 16"):
        latent_shape_of(model, (36, 4))
