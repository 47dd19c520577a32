"""The sums of EK-FAC's two passes against loops over single samples, for layers of odd shapes and layers used twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.tiny import tiny_latents, tiny_schedule
from wherefrom.curvature import FisherSettings, ekfac_passes
from wherefrom.curvature.ekfac_passes import CovariancePass, EigenvaluePass
from wherefrom.curvature.kronecker import LayerPlan, plan_layers
from wherefrom.models.diffusion import DiffusionModel

DATA = tiny_latents(4, captions=2)
SETTINGS = FisherSettings(samples_per_image=2, seed=3)
EVERYTHING = range(len(DATA))


class Odd(nn.Module):
    """A denoiser of every kind of layer that has a Kronecker form: more and fewer positions than columns and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.oblong = nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.strided = nn.Conv2d(4, 7, 3, stride=2, padding=1, bias=False)
        self.single = nn.Conv2d(4, 5, 1)
        self.token = nn.Linear(12, 12)  # used twice
        self.key = nn.Linear(12, 3, bias=False)
        self.value = nn.Linear(12, 3, bias=False)
        self.vector = nn.Linear(3, 5)
        self.last = nn.Conv2d(5, 4, 3, padding=1)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        text = torch.tanh(self.token(torch.tanh(self.token(encoder_hidden_states))))
        attended = (torch.softmax(self.key(text), dim=1) * self.value(text)).sum(dim=1)
        scale = torch.sin(self.oblong(noisy)).mean(dim=(1, 2, 3)) + torch.sin(self.strided(noisy)).mean(dim=(1, 2, 3))
        mixed = self.single(noisy) * (1 + scale)[:, None, None, None] + self.vector(attended)[:, :, None, None]
        return (self.last(torch.tanh(mixed)),)


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        denoiser = Odd().double()
    denoiser.requires_grad_(False)
    return DiffusionModel(denoiser, tiny_schedule())


@pytest.fixture(scope="module")
def plan(model: DiffusionModel) -> LayerPlan:
    return plan_layers(model, DATA, [name for name, _ in model.denoiser.named_parameters()])


def covariance_pass(model: DiffusionModel, plan: LayerPlan, batch_size: int = 64) -> CovariancePass:
    return CovariancePass(model, DATA, plan, SETTINGS, batch_size)


def bases(plan: LayerPlan) -> dict[str, Tensor]:
    """Orthogonal matrices of no significance."""
    random = torch.Generator().manual_seed(5)
    sides = {f"A/{layer.source}": layer.inputs for layer in plan.layers}
    sides |= {f"G/{layer.module}": layer.outputs for layer in plan.layers}
    return {
        name: torch.linalg.qr(torch.randn(side, side, generator=random, dtype=torch.float64)).Q
        for name, side in sides.items()
    }


def eigenvalue_pass(model: DiffusionModel, plan: LayerPlan, batch_size: int = 64) -> EigenvaluePass:
    return EigenvaluePass(
        model, data=DATA, plan=plan, eigenvectors=bases(plan), settings=SETTINGS, batch_size=batch_size
    )


Calls = Mapping[str, list[tuple[Tensor, Tensor]]]


def single_samples(model: DiffusionModel, plan: LayerPlan) -> Iterator[tuple[Calls, dict[str, Tensor]]]:
    """(input and output gradient of each layer's calls, gradient of each parameter) of one sample after the other."""
    noise_samples, denoiser = covariance_pass(model, plan), model.denoiser
    parameters = dict(denoiser.named_parameters())
    kept: list[tuple[str, Tensor, Tensor]] = []
    handles = [
        denoiser.get_submodule(layer.module).register_forward_hook(
            lambda _, inputs, output, name=layer.module: kept.append((name, inputs[0].detach(), output))
        )
        for layer in plan.layers
    ]
    denoiser.requires_grad_(True)
    for image in EVERYTHING:
        for flip in range(2):
            for visit in range(SETTINGS.samples_per_image):
                kept.clear()
                loss = noise_samples.losses(*(torch.tensor([value]) for value in (image, flip, visit))).sum()
                result = torch.autograd.grad(loss, [*(output for _, _, output in kept), *parameters.values()])
                calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
                for (name, inputs, _), grad in zip(kept, result, strict=False):
                    calls.setdefault(name, []).append((inputs, grad))
                yield calls, dict(zip(parameters, result[len(kept) :], strict=True))
    denoiser.requires_grad_(False)
    for handle in handles:
        handle.remove()


def oracle(model: DiffusionModel, plan: LayerPlan) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Σ aaᵀ and Σ ggᵀ, and Σ (Q_Gᵀ ∇W Q_A)², from the definitions."""
    basis, grams, squares = bases(plan), {}, {}
    for calls, gradients in single_samples(model, plan):
        for layer in plan.layers:
            module = model.denoiser.get_submodule(layer.module)
            for inputs, grad in calls[layer.module]:
                a, g = inputs, grad
                if isinstance(module, nn.Conv2d):
                    count = module.weight[0].numel()
                    units = torch.eye(count, dtype=a.dtype).reshape(count, *module.weight.shape[1:])
                    a = functional.conv2d(a, units, None, module.stride, module.padding, module.dilation)
                    a, g = a.movedim(1, -1), g.movedim(1, -1)
                a, g = a.flatten(0, -2), g.flatten(0, -2)
                a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1) if layer.bias else a
                if layer.source == layer.module:
                    grams[f"A/{layer.module}"] = grams.get(f"A/{layer.module}", 0) + a.T @ a
                grams[f"G/{layer.module}"] = grams.get(f"G/{layer.module}", 0) + g.T @ g
            matrix = gradients[f"{layer.module}.weight"].flatten(1)
            if layer.bias:
                matrix = torch.cat([matrix, gradients[f"{layer.module}.bias"][:, None]], 1)
            rotated = basis[f"G/{layer.module}"].T @ matrix @ basis[f"A/{layer.source}"]
            squares[f"L/{layer.module}"] = squares.get(f"L/{layer.module}", 0) + rotated.square()
    return grams, squares


def assert_same(result: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert float(value.abs().max()) > 0
        assert float((result[name] - value).abs().max()) <= 1e-12 * float(value.abs().max()), name


def test_the_layers_take_every_way(plan: LayerPlan) -> None:
    assert {layer.module for layer in plan.layers} == {name for name, _ in Odd().named_children()}
    assert plan.diagonal == ()
    assert {layer.module: layer.places for layer in plan.layers if layer.places > 1} == {
        "oblong": 6,
        "strided": 9,
        "last": 9,
    }
    positions = {"oblong": 12, "strided": 4, "single": 16, "token": 12, "key": 6, "value": 6, "vector": 1, "last": 16}
    ways = {
        (positions[layer.module] <= layer.outputs * layer.sharers, positions[layer.module] <= layer.inputs)
        for layer in plan.layers
    }
    assert ways == {(True, True), (False, True), (False, False)}
    assert {layer.module for layer in plan.layers if layer.sharers == 2} == {"key", "value"}


@pytest.mark.parametrize("batch_size", [3, 64])
def test_both_passes_equal_a_loop_over_single_samples(
    model: DiffusionModel, plan: LayerPlan, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grams, squares = oracle(model, plan)
    for block, numbers in ((ekfac_passes._BLOCK, ekfac_passes._ON_CPU), (5, 1), (4, 90)):
        monkeypatch.setattr(ekfac_passes, "_BLOCK", block)
        monkeypatch.setattr(ekfac_passes, "_ON_CPU", numbers)
        covariances, eigenvalues = covariance_pass(model, plan, batch_size), eigenvalue_pass(model, plan, batch_size)
        covariances.step(EVERYTHING)
        eigenvalues.step(EVERYTHING)
        assert_same(covariances.covariances(), grams)
        assert_same(eigenvalues.sums, squares)


@pytest.mark.parametrize("make", [covariance_pass, eigenvalue_pass])
def test_states_add_up(model: DiffusionModel, plan: LayerPlan, make) -> None:
    whole, parts, merged = make(model, plan), [make(model, plan) for _ in range(2)], make(model, plan)
    whole.step(EVERYTHING)
    for part, positions in zip(parts, (range(1), range(1, len(DATA))), strict=True):
        part.step(positions)
        merged.merge(part.state_dict())
    assert merged.samples == whole.samples == len(DATA) * SETTINGS.per_image
    assert_same(
        {name: value.double() for name, value in merged.state_dict().items()},
        {name: value.double() for name, value in whole.state_dict().items()},
    )


@pytest.mark.parametrize("make", [covariance_pass, eigenvalue_pass])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_layer_whose_numbers_are_not_finite_is_named(
    model: DiffusionModel, plan: LayerPlan, make, bad: float
) -> None:
    work, layer = make(model, plan), model.denoiser.get_submodule("vector")

    def spoil(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0].clone().index_fill(1, torch.tensor([1]), bad),)

    # The output is finite again, so that nothing but what this layer multiplies is spoilt.
    handles = [
        layer.register_forward_pre_hook(spoil),
        layer.register_forward_hook(lambda module, inputs, output: output.nan_to_num(0.0, 0.0, 0.0)),
    ]
    try:
        with pytest.raises(ValueError, match=r"The gradient of 'vector' is not finite: check the model's weights"):
            work.step(range(1))
    finally:
        for handle in handles:
            handle.remove()
