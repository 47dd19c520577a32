"""Unlearning: closed forms on a linear model, the loss increase that was asked for, and a model left as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny import one_process, tiny_latents, tiny_model, tiny_query, tiny_schedule
from wherefrom.attributors.unlearning.optimizers import NewtonAscent, SGDAscent
from wherefrom.attributors.unlearning.unlearner import Unlearned, Unlearner, UnlearningSettings, unlearn
from wherefrom.curvature import DiagonalMatrix, FisherSettings, IdentityMatrix
from wherefrom.curvature.diagonal import FisherPass
from wherefrom.gradients.query_loss import QueryLatent, QueryLoss
from wherefrom.models.conditioning import PROMPT
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset, select_weights
from wherefrom.runtime import keyed_random

QUERY = tiny_query()
GRADIENT, MEASURE = 402, 403  # the salts of the draws are part of the contract


class Quadratic:
    """L(θ) = ½ θᵀAθ + bᵀθ of two tensors, with a Fisher diagonal."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        root = torch.randn(7, 7, generator=random, dtype=torch.float64)
        self.a, self.b = root @ root.T, torch.randn(7, generator=random, dtype=torch.float64)
        self.start = torch.randn(7, generator=random, dtype=torch.float64)
        self.fisher = torch.rand(7, generator=random, dtype=torch.float64) + 0.5
        self.parameters = {
            "first": nn.Parameter(self.start[:3].clone()),
            "second": nn.Parameter(self.start[3:].clone()),
        }

    def theta(self) -> Tensor:
        return torch.cat(list(self.parameters.values()))

    def loss(self) -> Tensor:
        theta = self.theta()
        return theta @ self.a @ theta / 2 + self.b @ theta

    def curvature(self) -> DiagonalMatrix:
        return DiagonalMatrix({"first": self.fisher[:3], "second": self.fisher[3:]}, damping=0.0)


def climb(quadratic: Quadratic, optimizer: NewtonAscent, steps: int) -> list[float]:
    def closure() -> float:
        optimizer.zero_grad()
        loss = quadratic.loss()
        loss.backward()
        return loss.item()

    values = []
    for _ in range(steps):
        value = optimizer.step(closure)
        assert value is not None
        values.append(value)
    return values


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("pull", [False, True])
def test_newton_ascent_is_the_closed_form_on_a_quadratic(steps: int, pull: bool) -> None:
    quadratic, alpha, size = Quadratic(), 0.3, 20
    optimizer = NewtonAscent(quadratic.parameters.items(), quadratic.curvature(), alpha, size, pull)
    values = climb(quadratic, optimizer, steps)
    assert values == sorted(values)
    # δ ← (1 - α [pull]) δ + (α/N) F⁻¹ (A (θ₀ + δ) + b) is linear in δ: a geometric series from the first step.
    step = alpha / size / quadratic.fisher[:, None]
    matrix = (1 - alpha * pull) * torch.eye(7, dtype=torch.float64) + step * quadratic.a
    first = step[:, 0] * (quadratic.a @ quadratic.start + quadratic.b)
    series = sum((torch.linalg.matrix_power(matrix, power) @ first for power in range(steps)), torch.zeros(7))
    torch.testing.assert_close(quadratic.theta().detach(), quadratic.start + series, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [1, 3])
def test_sgd_ascent_is_the_closed_form_on_a_quadratic(steps: int) -> None:
    quadratic, alpha = Quadratic(), 0.01
    climb(quadratic, SGDAscent(quadratic.parameters.items(), alpha), steps)
    matrix = torch.eye(7, dtype=torch.float64) + alpha * quadratic.a
    first = alpha * (quadratic.a @ quadratic.start + quadratic.b)
    series = sum((torch.linalg.matrix_power(matrix, power) @ first for power in range(steps)), torch.zeros(7))
    torch.testing.assert_close(quadratic.theta().detach(), quadratic.start + series, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("alpha", "size"), [(-1.0, 1), (0.1, 0)])
def test_an_optimizer_refuses_what_makes_no_sense(alpha: float, size: int) -> None:
    with pytest.raises(ValueError, match=rf"given {alpha} and {size}"):
        NewtonAscent(Quadratic().parameters.items(), IdentityMatrix(), alpha, size)


class Linear(nn.Module):
    """A denoiser that is linear in the noisy latent and in the mean token state, called like a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(4)
        self.latent = nn.Parameter(torch.randn(4, 4, generator=random, dtype=torch.float64) / 2)
        self.text = nn.Parameter(torch.randn(4, 12, generator=random, dtype=torch.float64) / 4)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        text = encoder_hidden_states.mean(dim=1) @ self.text.T
        return (torch.einsum("oc,bchw->bohw", self.latent, noisy) + text[:, :, None, None],)


def moments(salt: int, seed: int, step: int, noise_samples: int) -> tuple[Tensor, Tensor, float]:
    """Mean over draws, sum over places, of φφᵀ, target φᵀ and |target|², where φ = (noisy latent, mean state).

    The draws are made again here from what they are keyed by.
    """
    process = tiny_schedule()
    base = keyed_random.combine(salt, seed, keyed_random.hash_text(QUERY.id), step)
    start = float(keyed_random.uniform(keyed_random.combine(401, base))[0])
    second, cross = torch.zeros(16, 16, dtype=torch.float64), torch.zeros(4, 16, dtype=torch.float64)
    square = 0.0
    for draw in range(noise_samples):
        timestep = math.floor((start + draw * 0.6180339887498949) % 1.0 * 1000)
        signal, spread = process.signal[timestep], process.spread[timestep]
        noise = keyed_random.normal(keyed_random.combine(base, draw)[None], (4, 4, 4), torch.float64)[0]
        noisy, target = signal * QUERY.latent + spread * noise, signal * noise - spread * QUERY.latent
        features = torch.cat([noisy.flatten(1), QUERY.conditioning[PROMPT].mean(0)[:, None].expand(-1, 16)])
        second += features @ features.T / noise_samples
        cross += target.flatten(1) @ features.T / noise_samples
        square += float(target.square().sum()) / noise_samples
    return second, cross, square


@pytest.mark.parametrize("steps", [1, 10, 100])
@pytest.mark.parametrize(("newton", "pull"), [(True, False), (True, True), (False, False)])
def test_unlearning_a_linear_model_is_the_closed_form(steps: int, newton: bool, pull: bool) -> None:
    denoiser = Linear()
    matrix = torch.cat([denoiser.latent, denoiser.text], dim=1).detach().clone()
    start = matrix.clone()
    fisher = torch.rand(4, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.1
    curvature = DiagonalMatrix({"latent": fisher[:, :4], "text": fisher[:, 4:]}, damping=0.1)
    damping = torch.cat([fisher[:, :4].mean().expand(4, 4), fisher[:, 4:].mean().expand(4, 12)], dim=1) * 0.1
    size, alpha, noise_samples, measure = 30, (2.0 if newton else 0.2), 20, 25
    if pull:
        alpha = 0.4
    alpha /= steps
    settings = UnlearningSettings(steps, noise_samples, None, alpha, newton, pull, measure, seed=6)
    model = DiffusionModel(denoiser, tiny_schedule())
    result = unlearn(
        model,
        query=QUERY,
        weights="all",
        curvature=curvature,
        dataset_size=size,
        settings=settings,
        runner=one_process(),
        batch_size=7,
    )

    second, cross, square = moments(MEASURE, 6, 0, measure)

    def value() -> float:
        return (float((matrix @ second * matrix).sum() - 2 * (matrix * cross).sum()) + square) / 64

    losses = [value()]
    for step in range(steps):
        step_second, step_cross, _ = moments(GRADIENT, 6, step, noise_samples)
        gradient = 2 * (matrix @ step_second - step_cross) / 64
        direction = gradient / (fisher + damping) / size if newton else gradient
        matrix = matrix + alpha * direction - alpha * pull * (matrix - start)
        losses.append(value())
    moved = torch.cat([result.moved["latent"], result.moved["text"]], dim=1)
    torch.testing.assert_close(moved, matrix, rtol=1e-10, atol=1e-12)
    assert result.losses == pytest.approx(losses, rel=1e-10)
    assert result.alphas == [alpha] * steps
    assert result.relative_loss_increase == pytest.approx(losses[-1] / losses[0] - 1, rel=1e-8)
    assert result.relative_loss_increase > 0.01


def curvature_of(model: DiffusionModel, subset: Subset) -> DiagonalMatrix:
    data = tiny_latents(6)
    names = list(select_weights(model.denoiser, subset))
    work = FisherPass(model, data, names, FisherSettings(samples_per_image=2), 64)
    work.step(range(len(data)))
    return DiagonalMatrix(work.mean(), damping=0.1)


def run(
    model: DiffusionModel, subset: Subset = "all", batch_size: int = 128, query: QueryLatent = QUERY, **settings: Any
) -> Unlearned:
    chosen = UnlearningSettings(**{"noise_samples": 48, "measurement_samples": 48, **settings})
    curvature = curvature_of(model, subset) if chosen.newton else IdentityMatrix()
    return unlearn(
        model,
        query=query,
        weights=subset,
        curvature=curvature,
        dataset_size=100,
        settings=chosen,
        runner=one_process(),
        batch_size=batch_size,
    )


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("newton", [True, False])
def test_the_relative_loss_increase_is_hit(steps: int, newton: bool) -> None:
    result = run(tiny_model(), steps=steps, newton=newton, relative_loss_increase=1e-2)
    assert result.relative_loss_increase == pytest.approx(1e-2, rel=0.011)
    assert len(result.alphas) == steps
    assert result.losses == sorted(result.losses)
    assert len(result.losses) == steps + 1
    assert min(result.alphas) > 0


def test_alpha_zero_moves_nothing() -> None:
    model = tiny_model()
    result = run(model, relative_loss_increase=None, alpha=0.0, steps=2)
    assert all(torch.equal(result.moved[name], value) for name, value in select_weights(model.denoiser, "all").items())
    assert result.relative_loss_increase == 0


@pytest.mark.parametrize("subset", ["cross_attention_kv", "cross_attention", "attention", "all"])
def test_only_the_chosen_weights_move(subset: Subset) -> None:
    model = tiny_model()
    chosen = select_weights(model.denoiser, subset)
    result = run(model, subset, relative_loss_increase=None, alpha=1.0, newton=False)
    assert result.moved.keys() == chosen.keys()
    assert any(not torch.equal(result.moved[name], value) for name, value in chosen.items())


def test_an_increase_out_of_reach_is_an_error() -> None:
    # Keys and values of text cross-attention alone cannot make this model as bad as that.
    with pytest.raises(
        ValueError, match=r"No step size raises the query's loss by .*Ask for a smaller relative_loss_increase"
    ):
        run(
            tiny_model(dtype=torch.float32),
            "cross_attention_kv",
            relative_loss_increase=1e30,
            noise_samples=8,
            measurement_samples=8,
            newton=False,
        )


def state_of(model: DiffusionModel) -> dict[str, tuple[Tensor, bool]]:
    return {name: (value.detach().clone(), value.requires_grad) for name, value in model.denoiser.named_parameters()}


def assert_untouched(model: DiffusionModel, before: dict[str, tuple[Tensor, bool]]) -> None:
    for name, parameter in model.denoiser.named_parameters():
        assert torch.equal(parameter, before[name][0]), name
        assert parameter.requires_grad == before[name][1], name
        assert parameter.grad is None, name


@pytest.mark.parametrize(
    "settings",
    [
        {"relative_loss_increase": 1e-2, "steps": 2},
        {"relative_loss_increase": None, "alpha": 1e200},
        {"relative_loss_increase": 1e30},
    ],
    ids=["ends", "breaks", "fails"],
)
def test_the_model_is_left_bit_for_bit_as_it_was(settings: dict[str, Any]) -> None:
    model = tiny_model()
    model.denoiser.conv_in.requires_grad_(True)  # type: ignore[union-attr]
    before = state_of(model)
    if settings.get("relative_loss_increase") == 1e-2:
        run(model, newton=False, **settings)
    else:
        with pytest.raises(ValueError, match=r"No step size raises|The loss of query 'query' is"):
            run(model, "cross_attention_kv", newton=False, **settings)
    assert_untouched(model, before)


def test_a_loss_that_is_no_number_names_the_query_and_the_step() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"The loss of query 'fox 1' is .* after step 1 of unlearning"):
        run(model, newton=False, relative_loss_increase=None, alpha=1e200, query=tiny_query("fox 1"))
    with torch.no_grad():
        model.denoiser.conv_out.bias[0] = float("nan")  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match=r"The loss of query 'fox 2' is nan after step 0 of unlearning"):
        run(model, newton=False, query=tiny_query("fox 2"))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    model = tiny_model()
    chosen = select_weights(model.denoiser, "all")
    model.denoiser.requires_grad_(True)
    small, large = (QueryLoss(model, QUERY, 1, one_process(), size) for size in (batch_size, 256))
    assert small.value(20) == pytest.approx(large.value(20), rel=1e-12)
    gradients, expected = small.gradient(chosen, 2, 20), large.gradient(chosen, 2, 20)
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-9, atol=1e-13 * scale)


def test_draws_belong_to_seed_query_and_step() -> None:
    model = tiny_model()
    chosen = select_weights(model.denoiser, "cross_attention_kv")
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    name = next(iter(chosen))

    def gradient(seed: int, query: str, step: int) -> Tensor:
        return QueryLoss(model, tiny_query(query), seed, one_process()).gradient(chosen, step, 8)[name]

    base = gradient(0, "a", 0)
    assert torch.equal(gradient(0, "a", 0), base)
    for other in (gradient(1, "a", 0), gradient(0, "b", 0), gradient(0, "a", 1)):
        assert not torch.allclose(other, base, rtol=1e-3)


def test_the_unlearner_moves_the_model_step_by_step() -> None:
    model, settings = tiny_model(), UnlearningSettings(2, 16, None, 0.5, False, measurement_samples=16)
    expected = run(
        model, noise_samples=16, measurement_samples=16, steps=2, relative_loss_increase=None, alpha=0.5, newton=False
    )
    work = Unlearner(
        model,
        query=QUERY,
        weights="all",
        curvature=IdentityMatrix(),
        dataset_size=100,
        settings=settings,
        runner=one_process(),
    )
    for _ in range(2):
        work.step()
    assert work.losses == expected.losses
    for name, parameter in model.denoiser.named_parameters():
        assert torch.equal(parameter, expected.moved[name])
        assert not parameter.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"relative_loss_increase": 0.1, "alpha": 0.1},
            r"either relative_loss_increase or alpha.*relative_loss_increase=0\.1 and alpha=0\.1",
        ),
        ({"relative_loss_increase": None}, "either relative_loss_increase or alpha.*increase=None and alpha=None"),
        ({"relative_loss_increase": -0.1}, r"relative_loss_increase must be positive.*given -0\.1"),
        ({"relative_loss_increase": None, "alpha": -0.1}, r"alpha must not be negative.*given -0\.1"),
        ({"steps": 0}, "must be at least 1"),
        ({"noise_samples": 0}, "must be at least 1"),
        ({"measurement_samples": 0}, "must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnlearningSettings(**settings)
