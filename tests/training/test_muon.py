"""MuonAdamW against torch's two optimizers, and what training asks of an optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from wherefrom.training.lr_schedules import WarmupStableDecay
from wherefrom.training.muon import MuonAdamW, orthogonalise


def network(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 16, 3), nn.Flatten(), nn.Linear(16 * 4, 24, bias=False), nn.Linear(24, 3)]
    return nn.Sequential(*layers).to(memory_format=memory_format)


def loss_of(model: nn.Module, step: int) -> Tensor:
    images = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(step))
    return model(images).square().mean()


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def iterated(matrix: Tensor, *_: object) -> Tensor:
    """Newton-Schulz on one matrix, as torch's but in float64, where torch's is in bfloat16."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.to(matrix.dtype)


def test_it_is_muon_for_matrices_and_adamw_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", iterated)
    model, expected = network(), network()
    take_steps(model, MuonAdamW(model.parameters(), lr=0.01, weight_decay=0.1), range(4))
    kernel = nn.Parameter(expected[0].weight.detach().reshape(16, -1).clone())
    muon = Muon([kernel, expected[2].weight], 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [expected[0].bias, expected[3].weight, expected[3].bias]
    adamw = AdamW(rest, 0.01, (0.9, 0.99), weight_decay=0.1)
    for step in range(4):
        expected[0].weight.data = kernel.data.reshape(16, 4, 3, 3)
        expected.zero_grad()
        loss_of(expected, step).backward()
        kernel.grad = expected[0].weight.grad.reshape(16, -1)
        muon.step()
        adamw.step()
    expected[0].weight.data = kernel.data.reshape(16, 4, 3, 3)
    for result, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model[3].weight, network()[3].weight)


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (6, 11), (6, 12), (6, 80)])
def test_orthogonalising_is_the_iteration_on_each_matrix_alone(rows: int, columns: int) -> None:
    stacked = torch.randn(3, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    collected = orthogonalise(stacked)
    for matrix, result in zip(stacked, collected, strict=True):
        torch.testing.assert_close(result, iterated(matrix))
        assert torch.linalg.svdvals(result).sub(1).abs().max() < 0.35
    torch.testing.assert_close(orthogonalise(stacked.float()).double(), collected, rtol=1e-3, atol=1e-4)


def test_a_state_of_another_optimizer_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="not one that MuonAdamW wrote"):
        MuonAdamW(model.parameters()).load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


def test_the_memory_format_of_kernels_does_not_matter() -> None:
    model, last = network(), network(torch.channels_last)
    take_steps(model, MuonAdamW(model.parameters(), lr=0.01), range(4))
    take_steps(last, MuonAdamW(last.parameters(), lr=0.01), range(4))
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    for result, wanted in zip(last.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-3, atol=1e-4)


def test_a_state_is_gone_on_with_and_a_schedule_is_followed() -> None:
    def begin(model: nn.Module) -> tuple[MuonAdamW, WarmupStableDecay]:
        optimizer = MuonAdamW(model.parameters(), lr=0.01)
        return optimizer, WarmupStableDecay(optimizer, total_steps=6, warmup_steps=2, decay_steps=3)

    def go(model: nn.Module, optimizer: MuonAdamW, schedule: WarmupStableDecay, steps: range) -> None:
        for step in steps:
            take_steps(model, optimizer, range(step, step + 1))
            schedule.step()

    whole, first = network(), network()
    go(whole, *begin(whole), range(6))
    half, schedule = begin(first)
    go(first, half, schedule, range(3))
    second = copy.deepcopy(first)
    state = copy.deepcopy((half.state_dict(), schedule.state_dict()))
    resumed, resumed_schedule = begin(second)
    resumed.load_state_dict(state[0])
    resumed_schedule.load_state_dict(state[1])
    go(second, resumed, resumed_schedule, range(3, 6))
    for result, wanted in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(result, wanted)
    before = [each.detach().clone() for each in second.parameters()]
    take_steps(second, resumed, range(6, 7))
    for result, wanted in zip(second.parameters(), before, strict=True):
        assert torch.equal(result, wanted), "the schedule ended at 0"


def test_clipping_and_missing_gradients() -> None:
    model = network()
    optimizer = MuonAdamW(model.parameters(), lr=0.01)
    listed = [each for group in optimizer.param_groups for each in group["params"]]
    assert all(result is wanted for result, wanted in zip(listed, model.parameters(), strict=True)), "what is clipped"
    before = model[0].weight.detach().clone()
    model[0].weight.requires_grad_(False)
    take_steps(model, optimizer, range(1))
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[2].weight, network()[2].weight)
    with pytest.raises(ValueError, match=r"given one of \(2, 3, 4\)"):
        MuonAdamW([nn.Parameter(torch.zeros(2, 3, 4))])
