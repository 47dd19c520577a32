"""Which weights a subset names in each architecture, and their gradients one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tests.support.pipelines import pixart_transformer, sd3_transformer, unet_with
from wherefrom.gradients.per_sample import PerSampleGradients
from wherefrom.models.conditioning import MASK, PROMPT, Conditioning
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.noise_schedule import noise_schedule_of
from wherefrom.models.parameter_subsets import Subset, select_weights, trainable

XL = {
    "cross_attention_dim": 20,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
}
NEWER = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}  # as in Stable Diffusion 3.5


def layers(network: nn.Module, subset: Subset) -> set[str]:
    """Attention layer and projection of the weights chosen, such as `attn2.to_k`."""
    names = [name.removesuffix(".weight").removesuffix(".bias") for name in select_weights(network, subset)]
    return {".".join(name.removesuffix(".0").split(".")[-2:]) for name in names}


SELF = {f"attn1.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out")}
CROSS = {f"attn2.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out")}
TEXT = {f"attn.{layer}" for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
IMAGE = {f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out")}
NORMS = {f"attn.norm_added_{each}" for each in "qk"}


@pytest.mark.parametrize("network", [unet_with(), unet_with(**XL), pixart_transformer()])
def test_subsets_of_cross_attention(network: nn.Module) -> None:
    assert layers(network, "cross_attention_kv") == {"attn2.to_k", "attn2.to_v"}
    assert layers(network, "cross_attention") == CROSS
    assert layers(network, "attention") == SELF | CROSS
    assert len(select_weights(network, "all")) == len(list(network.parameters()))


@pytest.mark.parametrize("changes", [{}, NEWER])
def test_subsets_of_joint_attention(changes: dict[str, Any]) -> None:
    network = sd3_transformer(**changes)
    norms, own = (NORMS, {f"attn2.{each}" for each in ("norm_q", "norm_k")}) if changes else (set(), set())
    assert layers(network, "cross_attention_kv") == {"attn.add_k_proj", "attn.add_v_proj"}
    assert layers(network, "cross_attention") == TEXT | norms
    dual = CROSS | own | {"attn.norm_q", "attn.norm_k"} if changes else set()
    assert layers(network, "attention") == TEXT | IMAGE | norms | dual
    assert len(select_weights(network, "all")) == len(list(network.parameters()))


def beside_tokens(model: DiffusionModel, numbers: Tensor) -> dict[str, Tensor]:
    """What the model's family declares beside the prompt embeddings, from these numbers; a mask of zeros and ones."""
    result = {}
    for name, shape in model.family.conditioning().items():
        if name == MASK:
            result[name] = (numbers > 0.3).to(numbers)
        elif name != PROMPT:
            (count,) = shape
            result[name], numbers = numbers[:, :count], numbers[:, count:]
    return result


@pytest.mark.parametrize(
    ("make", "width", "extra", "subset"),
    [
        (lambda: unet_with(**XL), 20, 10 + 6, "all"),
        (pixart_transformer, 24, 5, "attention"),
        (sd3_transformer, 24, 16, "all"),
        (lambda: sd3_transformer(**NEWER), 24, 16, "all"),
    ],
)
def test_per_sample_gradients_are_those_of_each_sample_alone(
    make: Callable[[], nn.Module], width: int, extra: int, subset: Subset
) -> None:
    network = make().double().eval()
    flow = hasattr(network, "time_text_embed")
    model = DiffusionModel(network, noise_schedule_of(FlowMatchEulerDiscreteScheduler() if flow else DDPMScheduler()))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():  # some layers are initialised to nothing
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=random, dtype=torch.float64)
    tokens = torch.randn(3, 5, width, generator=random, dtype=torch.float64)
    beside = torch.rand(3, extra, generator=random, dtype=torch.float64)
    conditioning = Conditioning({PROMPT: tokens, **beside_tokens(model, beside)})
    steps, parameters = torch.tensor([10, 500, 900]), select_weights(network, subset)
    with PerSampleGradients(network, list(parameters)) as tap:
        result = dict(tap.per_sample(model.losses(latents, conditioning, steps, noise)))
    assert result.keys() == parameters.keys()
    for row in range(3):
        rows = slice(row, row + 1)
        with trainable(network, parameters):
            loss = model.losses(latents[rows], conditioning.at(rows), steps[rows], noise[rows])
            alone = torch.autograd.grad(loss.sum(), list(parameters.values()))
        for name, gradient in zip(parameters, alone, strict=True):
            # Time embeddings and root-mean-square norms are computed in single precision.
            torch.testing.assert_close(result[name][row], gradient, rtol=1e-4, atol=1e-8)
