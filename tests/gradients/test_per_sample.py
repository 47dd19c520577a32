"""Per-sample gradients against a loop over batches of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.pipelines import pixart_transformer
from tests.support.tiny import tiny_latents, tiny_model
from wherefrom.gradients.per_sample import PerSampleGradients

SAMPLES = 5

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "linear over tokens": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear over tokens without bias": (lambda: nn.Linear(5, 3, bias=False), (4, 5)),
    "linear over two dimensions": (lambda: nn.Linear(5, 3), (2, 4, 5)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 5)),
    "convolution without bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 6, 5)),
    "padded convolution": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 2)), (3, 6, 5)),
    "strided convolution": (lambda: nn.Conv2d(3, 4, 3, stride=(2, 3), padding=1), (3, 7, 6)),
    "dilated oblong convolution": (lambda: nn.Conv2d(3, 4, (3, 1), dilation=2), (3, 7, 6)),
    "1 x 1 convolution": (lambda: nn.Conv2d(3, 4, 1), (3, 6, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4, eps=0.1), (4, 3, 5)),
    "group norm over tokens": (lambda: nn.GroupNorm(2, 4), (4, 6)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "layer norm": (lambda: nn.LayerNorm(5, eps=0.1), (5,)),
    "layer norm over tokens": (lambda: nn.LayerNorm(5), (4, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), (4, 5)),
    "layer norm of matrices": (lambda: nn.LayerNorm((4, 5)), (4, 5)),
    "layer norm of matrices over tokens": (lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
}


def random_weights(module: nn.Module) -> nn.Module:
    """Norms start as the identity, which would hide their own scale."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return module.double()


def inputs_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def losses_of(output: Tensor) -> Tensor:
    """One loss per sample whose gradient differs from place to place."""
    places = torch.linspace(0.5, 2.0, output[0].numel(), dtype=torch.float64)
    return (torch.sin(output.flatten(1)) * places).sum(dim=1)


def loop(module: nn.Module, losses: Callable[[slice], Tensor], count: int = SAMPLES) -> dict[str, Tensor]:
    """The oracle: autograd on one sample at a time."""
    parameters = dict(module.named_parameters())
    module.requires_grad_(True)
    rows = [
        torch.autograd.grad(losses(slice(index, index + 1)).sum(), list(parameters.values())) for index in range(count)
    ]
    module.requires_grad_(False)
    return {name: torch.stack(column) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)}


def tapped(module: nn.Module, losses: Callable[[slice], Tensor]) -> dict[str, Tensor]:
    with PerSampleGradients(module, [name for name, _ in module.named_parameters()]) as tap:
        return dict(tap.per_sample(losses(slice(None))))


def assert_same(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert result.keys() == expected.keys()
    scale = max(float(values.abs().max()) for values in expected.values())
    for name, values in expected.items():
        torch.testing.assert_close(
            result[name], values, rtol=1e-9, atol=1e-13 * scale, msg=lambda text, n=name: n + text
        )


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_gives_the_gradients_of_a_loop_over_single_samples(kind: str) -> None:
    make, shape = LAYERS[kind]
    module = random_weights(nn.Sequential(make()))
    inputs = inputs_of(shape)

    def losses(rows: slice) -> Tensor:
        return losses_of(module(inputs[rows]))

    expected = loop(module, losses)
    assert all(float(values.abs().max()) > 0.1 for values in expected.values())
    assert_same(tapped(module, losses), expected)


def test_every_weight_of_the_unet_gets_the_gradients_of_a_loop_over_single_samples() -> None:
    model, data = tiny_model(), tiny_latents(SAMPLES)
    random_weights(model.denoiser)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.mul_(0.3)
    timesteps = torch.tensor([3, 999, 400, 0, 650])
    noise = inputs_of((4, 4, 4))

    def losses(rows: slice) -> Tensor:
        return model.losses(data.latents_at(rows, 0), data.conditioning_at(rows, 0), timesteps[rows], noise[rows])

    expected = loop(model.denoiser, losses)
    assert {type(layer) for layer in model.denoiser.modules() if list(layer.parameters(recurse=False))} == {
        nn.Linear,
        nn.Conv2d,
        nn.GroupNorm,
        nn.LayerNorm,
    }
    assert_same(tapped(model.denoiser, losses), expected)


def test_every_weight_of_a_pixart_transformer_gets_the_gradients_of_a_loop_over_single_samples() -> None:
    network = random_weights(pixart_transformer())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.3)
    latents, states = inputs_of((4, 4, 4)), inputs_of((3, 24))
    timesteps, sizes = torch.tensor([3, 999, 400, 0, 650]), {"resolution": None, "aspect_ratio": None}

    def losses(rows: slice) -> Tensor:
        result = network(latents[rows], states[rows], timesteps[rows], added_cond_kwargs=sizes, return_dict=False)
        return losses_of(result[0])

    expected = loop(network, losses)
    tables = [name for name in expected if name.endswith("scale_shift_table")]
    assert tables == ["scale_shift_table", *(f"transformer_blocks.{block}.scale_shift_table" for block in (0, 1))]
    assert all(float(expected[name].abs().max()) > 0.1 for name in tables)
    assert_same(tapped(network, losses), expected)
    table = network.get_parameter("transformer_blocks.1.scale_shift_table")
    assert network.transformer_blocks[1].scale_shift_table is table
    with pytest.raises(RuntimeError), PerSampleGradients(network, tables):
        network(latents, states[:, :, :7], timesteps, added_cond_kwargs=sizes)
    assert network.scale_shift_table is network.get_parameter("scale_shift_table")


class Twice(nn.Module):
    """One layer used twice, as in models with shared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(5, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.shared(inputs)))


def test_a_layer_that_is_called_twice_is_summed() -> None:
    module, inputs = random_weights(Twice()), inputs_of((4, 5))

    def losses(rows: slice) -> Tensor:
        return losses_of(module(inputs[rows]))

    assert_same(tapped(module, losses), loop(module, losses))


@pytest.mark.parametrize(
    ("layer", "parameter"),
    [
        (nn.BatchNorm2d(4), "weight"),
        (nn.Embedding(3, 4), "weight"),
        (nn.Conv1d(4, 4, 3), "weight"),
        (nn.ConvTranspose2d(4, 4, 3), "weight"),
        (nn.Conv2d(4, 4, 3, groups=2), "weight"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "weight"),
        (nn.Conv2d(4, 4, 3, padding="same"), "weight"),
        (nn.PReLU(), "weight"),
    ],
)
def test_a_layer_without_a_rule_is_refused_by_name(layer: nn.Module, parameter: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(ValueError, match=rf"No per-sample gradient for 1\.{parameter} \({type(layer).__name__}\)"):
        PerSampleGradients(module, [f"1.{parameter}"])


def test_only_the_weights_that_were_named_are_given_and_nothing_stays_behind() -> None:
    module, inputs = random_weights(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))), inputs_of((5,))
    module.requires_grad_(False)

    def losses(rows: slice) -> Tensor:
        return losses_of(module(inputs[rows]))

    expected = loop(module, losses)
    with PerSampleGradients(module, ["2.weight", "0.bias"]) as tap:
        result = dict(tap.per_sample(losses(slice(None))))
        again = dict(tap.per_sample(losses(slice(None))))
    assert_same(result, {name: expected[name] for name in ("2.weight", "0.bias")})
    assert_same(again, result)
    assert not any(layer._forward_hooks for layer in module.modules())
    assert not losses(slice(None)).requires_grad
