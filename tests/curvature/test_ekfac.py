"""EK-FAC against a dense construction from single samples, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from tests.support.curvature import DATA, SETTINGS, assert_close, names_of
from tests.support.tiny import moved_copy, one_process, tiny_model
from wherefrom.curvature import EKFACMatrix, fit_ekfac, load_ekfac, save_ekfac
from wherefrom.curvature.ekfac import KroneckerFactors, eigenvectors_of
from wherefrom.curvature.fisher_samples import SampledPass
from wherefrom.curvature.kronecker import plan_layers
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset, select_weights
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store

CROSS = "mid_block.attentions.0.transformer_blocks.0.attn2"


def fit(
    root: Path,
    subset: Subset = "all",
    model: DiffusionModel | None = None,
    layers_per_pass: int | None = None,
    batch_size: int = 64,
    damping: float = 0.1,
) -> EKFACMatrix:
    model = tiny_model() if model is None else model
    names = names_of(model, subset)
    return fit_ekfac(
        model,
        data=DATA,
        names=names,
        store=Store(root),
        runner=one_process(),
        settings=SETTINGS,
        damping=damping,
        layers_per_pass=layers_per_pass,
        batch_size=batch_size,
    )


def a_gradient(model: DiffusionModel, subset: Subset = "all") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in select_weights(model.denoiser, subset).items()
    }


class Loop:
    """Inputs, output gradients and parameter gradients of one sample at a time, by plain hooks and autograd."""

    def __init__(self, model: DiffusionModel, names: list[str]) -> None:
        self.model, self.parameters = model, select_weights(model.denoiser, "all")
        self.owners = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        model.denoiser.requires_grad_(True)
        for owner in self.owners:
            model.denoiser.get_submodule(owner).register_forward_hook(self.hook(owner))

    def hook(self, owner: str):
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[owner], self.outputs[owner] = inputs[0].detach(), output

        return keep

    def samples(self):
        """Yields (output gradients by layer, gradients by parameter); `inputs` holds the inputs."""

        class Draws(SampledPass):
            def add(self, tap, losses) -> None: ...
            def merge(self, state) -> None: ...
            def state_dict(self) -> dict[str, Tensor]: ...

        noise_samples = Draws(self.model, DATA, [], SETTINGS, 1).noise_samples
        for image in range(len(DATA)):
            for flip in range(2):
                for visit in range(SETTINGS.samples_per_image):
                    timestep, caption, key = noise_samples(*(torch.tensor([value]) for value in (image, flip, visit)))
                    latent = DATA.groups[0].latents[image, flip][None]
                    noise = keyed_random.normal(key, latent.shape[1:], torch.float64)
                    loss = self.model.losses(latent, DATA.conditioning_at(image, caption), timestep, noise).sum()
                    targets = [*self.outputs.values(), *self.parameters.values()]
                    result = torch.autograd.grad(loss, targets)
                    yield (
                        dict(zip(self.outputs, result, strict=False)),
                        dict(zip(self.parameters, result[len(self.outputs) :], strict=True)),
                    )


def rows(module: nn.Module, inputs: Tensor, grads: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """(positions, I) and (positions, O), a convolution's patches by a convolution with unit kernels."""
    if isinstance(module, nn.Conv2d):
        count = module.weight[0].numel()
        units = torch.eye(count, dtype=inputs.dtype).reshape(count, *module.weight.shape[1:])
        inputs = functional.conv2d(inputs, units, None, module.stride, module.padding).movedim(1, -1)
        grads = grads.movedim(1, -1)
    a, g = inputs.flatten(0, -2), grads.flatten(0, -2)
    return (torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1) if bias else a), g


def dense_steps(model: DiffusionModel, gradient: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
    """(F + δ)⁻¹ g with F the dense matrix of each layer, from its definition."""
    loop = Loop(model, list(gradient))
    layers = {}
    for owner in loop.owners:
        module = model.denoiser.get_submodule(owner)
        if isinstance(module, nn.Linear | nn.Conv2d) and f"{owner}.weight" in gradient:
            layers[owner] = (module, f"{owner}.bias" in gradient)
    covariances: dict[str, list[Tensor]] = {}
    for output_grads, _ in loop.samples():
        for owner, (module, bias) in layers.items():
            a, g = rows(module, loop.inputs[owner], output_grads[owner], bias)
            total = covariances.setdefault(owner, [torch.zeros(()), torch.zeros(())])
            total[0], total[1] = total[0] + a.T @ a, total[1] + g.T @ g
    basis = {owner: [torch.linalg.eigh(side).eigenvectors for side in sides] for owner, sides in covariances.items()}

    def matrix(values: Mapping[str, Tensor], owner: str) -> Tensor:
        weight = values[f"{owner}.weight"].flatten(1)
        return torch.cat([weight, values[f"{owner}.bias"][:, None]], 1) if layers[owner][1] else weight

    count, squares = 0, {}
    for _, parameter_grads in loop.samples():
        count += 1
        for owner, (q_a, q_g) in basis.items():
            squares[owner] = squares.get(owner, 0) + (q_g.T @ matrix(parameter_grads, owner) @ q_a).square()
        for name in gradient:
            if name.rpartition(".")[0] not in layers:
                squares[name] = squares.get(name, 0) + parameter_grads[name].square()
    steps = {}
    for owner, (q_a, q_g) in basis.items():
        values = (squares[owner] / count).flatten()
        vectors = torch.kron(q_g, q_a)
        fisher = vectors @ (values[:, None] * vectors.T)
        side = len(values)
        damped = fisher + damping * values.mean() * torch.eye(side, dtype=values.dtype)
        flat = torch.linalg.solve(damped, matrix(gradient, owner).flatten())
        step = flat.reshape(q_g.shape[0], q_a.shape[0])
        weight = gradient[f"{owner}.weight"]
        steps[f"{owner}.weight"] = step[:, : weight[0].numel()].reshape(weight.shape)
        if layers[owner][1]:
            steps[f"{owner}.bias"] = step[:, -1]
    for name in gradient:
        if name not in steps:
            fisher = squares[name] / count
            steps[name] = gradient[name] / (fisher + damping * fisher.mean())
    return steps


@pytest.mark.parametrize("subset", ["cross_attention_kv", "all"])
def test_it_equals_the_dense_construction(tmp_path: Path, subset: Subset) -> None:
    model = tiny_model()
    gradient = a_gradient(model, subset)
    kept = {name: value for name, value in gradient.items() if value.numel() <= 1200}
    modules = [model.denoiser.get_submodule(name.rpartition(".")[0]) for name in kept if name.endswith(".weight")]
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    strides = {module.stride for module in modules if isinstance(module, nn.Conv2d)}
    assert f"{CROSS}.to_k.weight" in kept
    assert {module.bias is not None for module in linear} == ({True, False} if subset == "all" else {False})
    assert strides == ({(1, 1), (2, 2)} if subset == "all" else set())
    fitted = fit_ekfac(
        model, data=DATA, names=list(kept), store=Store(tmp_path), runner=one_process(), settings=SETTINGS
    )
    assert_close(fitted.precondition(kept), dense_steps(model, kept, 0.1), 1e-6)


def test_batches_blocks_and_subsets_change_nothing(tmp_path: Path) -> None:
    gradient = a_gradient(tiny_model())
    whole = fit(tmp_path / "whole").precondition(gradient)
    assert_close(fit(tmp_path / "single", batch_size=1).precondition(gradient), whole, 1e-7)
    assert_close(fit(tmp_path / "blocks", layers_per_pass=5).precondition(gradient), whole, 1e-7)
    kv = names_of(tiny_model(), "cross_attention_kv")
    result = fit(tmp_path / "part", "cross_attention_kv").precondition({name: gradient[name] for name in kv})
    assert_close(result, {name: whole[name] for name in kv}, 1e-7)


def test_layers_with_one_input_share_its_factor() -> None:
    model = tiny_model()
    plan = plan_layers(model, DATA, names_of(model, "cross_attention_kv"))
    assert len({layer.source for layer in plan.layers}) == 1
    assert {layer.sharers for layer in plan.layers} == {len(plan.layers)}
    assert plan.diagonal == ()
    everything = plan_layers(model, DATA, names_of(model, "all"))
    assert "conv_norm_out.weight" in everything.diagonal
    sources = {layer.module: layer.source for layer in everything.layers}
    assert sources[f"{CROSS}.to_k"] == sources[f"{CROSS}.to_v"] != sources[f"{CROSS}.to_q"]
    blocks = everything.blocks(4)
    assert [layer.module for block in blocks for layer in block.layers] == [layer.module for layer in everything.layers]
    assert max(len(block.layers) for block in blocks) == 4
    assert max(block.memory() for block in blocks) < everything.memory()
    assert sorted(name for block in blocks for name in block.names) == sorted(everything.names)


def test_factors_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit(tmp_path, "cross_attention_kv")
    monkeypatch.setattr(SampledPass, "step", None)
    again = fit(tmp_path, "cross_attention_kv")
    for name, factors in first.layers.items():
        assert torch.equal(again.layers[name].eigenvalues, factors.eigenvalues)
        assert torch.equal(again.layers[name].activation, factors.activation)


def test_factors_survive_a_round_trip_through_the_files(tmp_path: Path) -> None:
    model = tiny_model()
    fitted, gradient = fit(tmp_path / "store", model=model), a_gradient(model)
    save_ekfac(tmp_path / "saved", fitted, model)
    loaded = load_ekfac(tmp_path / "saved", model)
    assert_close(loaded.precondition(gradient), fitted.precondition(gradient), 1e-12)
    sums = load_file(tmp_path / "saved" / "lambda_matrix.safetensors")
    counts = load_file(tmp_path / "saved" / "num_lambda_processed.safetensors")
    name = f"{CROSS}.to_k"
    assert int(counts[name]) == fitted.samples == len(DATA) * SETTINGS.per_image
    torch.testing.assert_close(sums[name], fitted.layers[name].eigenvalues * fitted.samples)


def test_factors_of_another_model_are_refused(tmp_path: Path) -> None:
    model, other = tiny_model(), moved_copy(tiny_model())
    fitted = fit(tmp_path / "store", "cross_attention_kv", model)
    save_ekfac(tmp_path / "saved", fitted, model)
    with pytest.raises(ValueError, match="curvature_from declares nothing"):
        load_ekfac(tmp_path / "saved", other)
    assert load_ekfac(tmp_path / "saved", other, curvature_from=model.fingerprint()).samples == fitted.samples
    (tmp_path / "saved" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="set curvature_from: undeclared"):
        load_ekfac(tmp_path / "saved", model)
    assert load_ekfac(tmp_path / "saved", model, curvature_from="undeclared").samples == fitted.samples
    path = tmp_path / "saved" / "lambda_matrix.safetensors"
    sums = load_file(path)
    sums[f"{CROSS}.to_k"] = sums[f"{CROSS}.to_k"][:, :-2].contiguous()
    save_file(sums, path)
    with pytest.raises(ValueError, match=r"layer '.*to_k' has eigenvalues of shape .* a model of another kind"):
        load_ekfac(tmp_path / "saved", model, curvature_from="undeclared")


def test_what_cannot_be_preconditioned_is_refused(tmp_path: Path) -> None:
    eye = torch.eye(2, dtype=torch.float64)
    factors = KroneckerFactors(eye, eye, torch.ones(2, 2, dtype=torch.float64), bias=True)
    curvature = EKFACMatrix({"layer": factors})
    weight, bias = torch.ones(2, 1, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="'layer' is that of weight and bias together"):
        curvature.precondition({"layer.weight": weight})
    with pytest.raises(ValueError, match="'layer' is that of weight and bias together"):
        curvature.precondition({"layer.bias": bias})
    with pytest.raises(ValueError, match=r"'layer' has shape \(2, 2\), its gradient \(2, 4\)"):
        curvature.precondition({"layer.weight": torch.ones(2, 3, dtype=torch.float64), "layer.bias": bias})
    with pytest.raises(ValueError, match=r"holds none for weight 'other\.weight'"):
        curvature.precondition({"other.weight": weight})
    flat = KroneckerFactors(eye, eye, torch.zeros(2, 2, dtype=torch.float64), bias=False)
    with pytest.raises(ValueError, match="not finite: some eigenvalues are 0"):
        EKFACMatrix({"layer": flat}, damping=0.0).precondition({"layer.weight": eye})
    with pytest.raises(ValueError, match="eigenvalues of layer 'layer' are negative or not finite"):
        EKFACMatrix({"layer": KroneckerFactors(eye, eye, -eye, bias=False)})
    with pytest.raises(ValueError, match="damping must not be negative"):
        EKFACMatrix({}, damping=-1.0)
    with pytest.raises(ValueError, match="The covariance 'A/layer' is not finite"):
        eigenvectors_of("A/layer", eye * float("nan"))
    with pytest.raises(ValueError, match="layers_per_pass must be at least 1"):
        fit(tmp_path, layers_per_pass=0)
