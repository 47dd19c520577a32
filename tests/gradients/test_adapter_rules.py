"""Per-sample gradients of LoHa's and LoKr's factors are those that autograd finds for each sample alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support import adapters as made_up
from tests.support.adapters import Make, kohya, made, save, targets
from tests.support.pipelines import images, stable_diffusion
from tests.support.tiny import one_process
from wherefrom.curvature import EKFAC, DiagonalFisher, FisherSettings
from wherefrom.curvature.estimators import FitContext
from wherefrom.data.encoded_images import encode_image_set
from wherefrom.gradients.per_sample import PerSampleGradients
from wherefrom.models.adapter_sources import AdapterSource
from wherefrom.models.adapters import add_adapters, read_adapters
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset, select_weights, trainable
from wherefrom.models.pipeline import load_model
from wherefrom.runtime.artifacts import Store

WORDS = (".down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", ".down_blocks.0.resnets.0.conv1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(str(stable_diffusion(tmp_path_factory.mktemp("model"))), torch.float64)


def with_adapters(base: DiffusionModel, folder: Path, *makes: Make) -> DiffusionModel:
    result, asked = copy.deepcopy(base), []
    for number, make in enumerate(makes):
        layers = made(targets(base.denoiser, WORDS), make, number)
        assert len(layers) == len(WORDS)
        asked.append(AdapterSource(str(save(folder / f"{number}.safetensors", kohya(layers))), 0.7))
    add_adapters(result, read_adapters(asked))
    return result


def check(model: DiffusionModel, subset: Subset) -> set[str]:
    parameters = select_weights(model.denoiser, subset)
    random = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=random, dtype=torch.float64)
    assert model.encoder is not None
    states, steps = model.encoder.text.encode([f"image {row}" for row in range(3)]), torch.arange(3) * 300

    def losses(rows: slice) -> Tensor:
        return model.losses(latents[rows], states.at(rows), steps[rows], noise[rows])

    with PerSampleGradients(model.denoiser, list(parameters)) as tap:
        result = dict(tap.per_sample(losses(slice(None))))
    assert result.keys() == parameters.keys()
    for row in range(3):
        with trainable(model.denoiser, parameters):
            alone = torch.autograd.grad(losses(slice(row, row + 1)).sum(), list(parameters.values()))
        for name, gradient in zip(parameters, alone, strict=True):
            assert gradient.abs().sum() > 0
            torch.testing.assert_close(result[name][row], gradient, rtol=1e-6, atol=1e-12)
    return set(parameters)


@pytest.mark.parametrize(
    "make",
    [made_up.tucker_lora, made_up.loha, made_up.whole_lokr, made_up.low_lokr, made_up.tucker_lokr],
)
def test_factors_have_each_samples_own_gradient(base: DiffusionModel, tmp_path: Path, make: Make) -> None:
    names = check(with_adapters(base, tmp_path, make), "adapter")
    assert any("conv1" in name for name in names)


def test_adapters_around_each_other_and_their_layer_have_theirs(base: DiffusionModel, tmp_path: Path) -> None:
    model = with_adapters(base, tmp_path, made_up.loha, made_up.lora, made_up.low_lokr, made_up.lora, made_up.loha)
    names = check(model, "cross_attention_kv")
    kinds = ("lora_A", "hada_w1_a", "lokr_w2_b", "base_layer.weight")
    assert all(any(kind in name for name in names) for kind in kinds)
    assert {f"default_{number}" for number in range(5)} <= {part for name in names for part in name.split(".")}


@pytest.mark.parametrize("curvature", [DiagonalFisher, EKFAC])
def test_curvature_is_fitted_to_factors(
    base: DiffusionModel, tmp_path: Path, curvature: type[DiagonalFisher] | type[EKFAC]
) -> None:
    model = with_adapters(base, tmp_path, made_up.loha, made_up.lora)
    train, store = images(3), Store(tmp_path / "store")
    assert model.encoder is not None
    data = encode_image_set(train, encoder=model.encoder, store=store)
    names = list(select_weights(model.denoiser, "adapter"))
    matrix = curvature(FisherSettings(1)).fit(FitContext(model, data, names, store, one_process()))
    ones = {name: torch.ones_like(model.denoiser.get_parameter(name)) for name in names}
    moved = matrix.precondition(ones)
    assert moved.keys() == ones.keys()
    assert all(torch.isfinite(value).all() for value in moved.values())
