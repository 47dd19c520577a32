"""LoRA: an adapter in the folder is loaded, its layers keep their subset, and gradients are those of each sample."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.support.pipelines import images, stable_diffusion
from tests.support.tiny import one_process
from wherefrom.attributors import AttributionByUnlearning, TrainingData
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings, unlearn
from wherefrom.curvature import EKFAC, DiagonalFisher, FisherSettings
from wherefrom.data.encoded_images import encode_image_set
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.gradients.per_sample import PerSampleGradients
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset, select_weights, trainable
from wherefrom.models.pipeline import LORA, load_model
from wherefrom.queries.sources import generate
from wherefrom.runtime.artifacts import Store

RANK, ALPHA = 2, 3


def with_adapter(folder: Path) -> Path:
    """Stable Diffusion 1 with a random adapter on all its attention, saved as diffusers' training scripts do."""
    peft = pytest.importorskip("peft")
    stable_diffusion(folder)
    unet: Any = load_model(str(folder)).denoiser
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers, init_lora_weights=False))
    state = peft.utils.get_peft_model_state_dict(unet)
    metadata = {"r": RANK, "lora_alpha": ALPHA, "target_modules": layers}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=metadata)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_adapter(tmp_path_factory.mktemp("lora"))


@pytest.fixture
def model(folder: Path) -> DiffusionModel:
    return load_model(str(folder), torch.float64)


def noise_samples(model: DiffusionModel, count: int = 3) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(0)
    assert model.encoder is not None
    states = model.encoder.text.encode([f"image {index}" for index in range(count)])
    latents, noise = torch.randn(2, count, 4, 4, 4, generator=random, dtype=torch.float64)
    return latents, states, torch.arange(count) * 300, noise


def test_the_adapter_is_added_to_the_weights(model: DiffusionModel, tmp_path: Path) -> None:
    base = load_model(str(stable_diffusion(tmp_path)), torch.float64)
    given = noise_samples(model)
    result = model.losses(*given)
    assert (result / base.losses(*given) - 1).abs().max() > 1e-3
    state, merged = model.denoiser.state_dict(), {}
    for name, value in base.denoiser.state_dict().items():
        wrapped = name.replace(".weight", ".base_layer.weight")
        merged[name] = value
        if name.endswith(".weight") and wrapped in state:
            (down,) = [each for key, each in state.items() if key.startswith(f"{name[:-7]}.lora_A.")]
            (up,) = [each for key, each in state.items() if key.startswith(f"{name[:-7]}.lora_B.")]
            merged[name] = value + ALPHA / RANK * up @ down
    base.denoiser.load_state_dict(merged)
    torch.testing.assert_close(result, base.losses(*given), rtol=1e-9, atol=0)
    prints = {model.fingerprint()}
    for module in model.denoiser.modules():
        if hasattr(module, "lora_A"):
            module.set_scale(next(iter(module.scaling)), 0.5)  # type: ignore[operator]
    assert model.fingerprint() not in prints


@pytest.mark.parametrize("subset", ["cross_attention_kv", "adapter"])
def test_per_sample_gradients_are_those_of_each_sample_alone(model: DiffusionModel, subset: Subset) -> None:
    parameters = select_weights(model.denoiser, subset)
    parts = {".".join(name.split(".")[-4:-2]) for name in parameters}
    if subset == "cross_attention_kv":
        assert {"to_k.lora_A", "to_v.lora_B", "attn2.to_k", "attn2.to_v"} <= parts
    assert any(".base_layer." in name for name in parameters) is (subset == "cross_attention_kv")
    assert any(".lora_A." in name for name in parameters)
    latents, states, steps, noise = noise_samples(model)
    with PerSampleGradients(model.denoiser, list(parameters)) as tap:
        result = dict(tap.per_sample(model.losses(latents, states, steps, noise)))
    assert result.keys() == parameters.keys()
    for row in range(3):
        rows = slice(row, row + 1)
        with trainable(model.denoiser, parameters):
            loss = model.losses(latents[rows], states.at(rows), steps[rows], noise[rows])
            alone = torch.autograd.grad(loss.sum(), list(parameters.values()))
        for name, gradient in zip(parameters, alone, strict=True):
            torch.testing.assert_close(result[name][row], gradient, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("curvature", [DiagonalFisher, EKFAC])
def test_fit_unlearn_score_and_rank(model: DiffusionModel, curvature: Any, tmp_path: Path) -> None:
    train, store = images(4), Store(tmp_path)
    assert model.encoder is not None
    data = TrainingData(train, encode_image_set(train, encoder=model.encoder, store=store))
    settings = UnlearningSettings(noise_samples=8, measurement_samples=8, relative_loss_increase=1e-3)
    method = AttributionByUnlearning(
        "adapter",
        unlearning=settings,
        grid=LossGrid(timesteps=2),
        curvature=curvature(FisherSettings(1)),
        timestep_weights="equal",
    )
    method.fit(data, model, store, one_process())
    (query,) = generate(model, prompts=["a big red square"], seed=0, shape=(4, 4, 4), sampling_steps=2)
    (scores,) = method.score([query])
    assert np.isfinite(scores.scores).all()
    assert len(np.unique(scores.scores)) == len(train)
    before = {name: value.clone() for name, value in model.denoiser.named_parameters()}
    moved = unlearn(
        model,
        query=method.query_latent(query),
        weights="adapter",
        curvature=method.curvature_matrix,
        dataset_size=len(train),
        settings=settings,
        runner=one_process(),
    ).moved
    assert moved.keys() == {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert all(not torch.equal(value, before[name]) for name, value in moved.items())


def test_without_an_adapter_there_are_no_such_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="UNet2DConditionModel has no weights of the subset 'adapter'"):
        select_weights(load_model(str(stable_diffusion(tmp_path))).denoiser, "adapter")


def test_an_adapter_needs_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stable_diffusion(tmp_path)
    (tmp_path / LORA).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pytorch_lora_weights.safetensors needs peft.*wherefrom\[lora\]"):
        load_model(str(tmp_path))
