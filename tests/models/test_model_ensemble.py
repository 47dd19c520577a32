"""Models whose scores cannot be averaged are told apart before anything long, by what differs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from tests.support.attribution import QUERY, TRAIN
from tests.support.tiny import (
    one_process,
    tiny_encoder,
    tiny_model,
    tiny_pipeline,
    tiny_schedule,
    tiny_unet,
    unet_config,
)
from wherefrom.attributors import TRAK, TrainingData
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.gradients.projection import Projection
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.encoders import LatentEncoder
from wherefrom.models.factories import unet_from_config
from wherefrom.models.model_ensemble import check_member, load_ensemble
from wherefrom.models.noise_schedule import NoiseSchedule
from wherefrom.models.pipeline import load_model
from wherefrom.runtime.artifacts import Store


def other_vae(encoder: LatentEncoder) -> None:
    encoder.vae.encoder.conv_out.bias.data += 0.1


def other_scale(encoder: LatentEncoder) -> None:
    encoder.vae.register_to_config(scaling_factor=0.5)


def other_text(encoder: LatentEncoder) -> None:
    next(encoder.text.model.parameters()).data += 0.1


def other_length(encoder: LatentEncoder) -> None:
    encoder.text.length += 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_vae, "autoencoder"),
        (other_scale, "autoencoder's scaling"),
        (other_text, "text encoder"),
        (other_length, "length"),
    ],
)
def test_another_encoder_is_refused(change: Callable[[LatentEncoder], None], what: str, tmp_path: Path) -> None:
    model, other = (tiny_model(seed, encoder=tiny_encoder(tmp_path / "text")) for seed in range(2))
    check_member("other", model, other, "all")
    assert other.encoder is not None
    change(other.encoder)
    with pytest.raises(ValueError, match=f"Ensemble member other differs in its {what}: .*the same autoencoder"):
        check_member("other", model, other, "all")


@pytest.mark.parametrize(
    ("process", "what"),
    [
        (tiny_schedule("epsilon"), "prediction type: 'epsilon', where the model that is attributed has 'v_prediction'"),
        (
            NoiseSchedule(DDPMScheduler(prediction_type="v_prediction", num_train_timesteps=500)),
            "number of timesteps: 500, where the model that is attributed has 1000",
        ),
        (
            NoiseSchedule(DDPMScheduler(prediction_type="v_prediction", beta_start=0.0002)),
            "noise schedule (√ᾱ at timestep 0): 0.99990000",
        ),
    ],
)
def test_another_noise_schedule_is_refused(process: NoiseSchedule, what: str) -> None:
    model = tiny_model()
    other = DiffusionModel(tiny_unet(1), process)
    with pytest.raises(ValueError, match=f"differs in its {re.escape(what)}.*with the same noise scheduler"):
        check_member("other", model, other, "all")


def test_another_architecture_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"shape of conv_in\.weight: \(4, 4, 3, 3\), where .* has \(8, 4, 3, 3\)"):
        check_member("other", model, tiny_model(channels=(4, 16)), "all")
    one_block = {**unet_config(), "layers_per_block": 2}
    deeper = DiffusionModel(unet_from_config(one_block), model.noise_schedule)
    with pytest.raises(ValueError, match=r"shape of .*attn2.*, where the model that is attributed has None"):
        check_member("other", model, deeper, "cross_attention_kv")
    wider = DiffusionModel(unet_from_config({**unet_config(), "in_channels": 5}), model.noise_schedule)
    with pytest.raises(ValueError, match=r"in_channels: 5, where the model that is attributed has 4"):
        check_member("other", model, wider, "cross_attention_kv")
    check_member("other", model, tiny_model(1), "all")


def test_it_is_refused_before_anything_is_projected(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "first")
    tiny_pipeline(tmp_path / "second", unet=tiny_unet(1, (4, 16)))
    model, second = load_model(str(tmp_path / "first")), str(tmp_path / "second")
    attributor = TRAK(projection=Projection(100), grid=LossGrid(timesteps=1), noise_samples=1, ensemble=[second])
    store = Store(tmp_path / "store")
    with pytest.raises(ValueError, match=f"Ensemble member {second} differs in its shape of conv_in"):
        attributor.fit(TrainingData(TRAIN.images, TRAIN), model, store, one_process())
    assert not store.root.exists()
    with pytest.raises(ValueError, match="fit must run before score"):
        next(attributor.score([QUERY]))


def test_members_are_brought_to_the_first_ones_type_of_number(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "first")
    model = load_model(str(tmp_path / "first"))
    model.denoiser.double()
    (other,) = load_ensemble(model, [str(tmp_path / "first")], "all")
    assert other.dtype == torch.float64
    assert load_ensemble(model, [], "all") == []
