"""Per-sample gradients of models that change tensors in place, against autograd on one sample at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.gradients.test_per_sample import assert_same, inputs_of, loop, losses_of, random_weights, tapped
from wherefrom.gradients.per_sample import PerSampleGradients


class Written(nn.Module):
    """Layers of a model, and a function of them that says how it runs."""

    def __init__(self, run: Callable[[Written, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.run(self, inputs)


def two(run: Callable[[Written, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Written(run, a=nn.Linear(5, 5), b=nn.Linear(5, 5))


def residual(model: Written, inputs: Tensor) -> Tensor:
    hidden = model.a(inputs)
    hidden += torch.tanh(inputs)
    return model.b(torch.sin(hidden))


def scaled(model: Written, inputs: Tensor) -> Tensor:
    return model.b(torch.sin(model.a(inputs).mul_(0.7))).mul_(1.3)


def part_of_an_output(model: Written, inputs: Tensor) -> Tensor:
    hidden = model.a(inputs)
    hidden[..., :2].mul_(3.0)
    return model.b(torch.sin(hidden))


def view_of_an_output(model: Written, inputs: Tensor) -> Tensor:
    hidden = model.a(inputs)
    hidden.flatten().sin_()
    return model.b(hidden)


def read_and_then_changed(model: Written, inputs: Tensor) -> Tensor:
    hidden = model.a(inputs)
    before = torch.exp(0.1 * hidden.clone())
    hidden.sin_()
    return model.b(before * hidden)


def overwritten(model: Written, inputs: Tensor) -> Tensor:
    hidden = model.a(inputs)
    hidden[..., 0] = 1.5
    return model.b(torch.sin(hidden))


def by_name(model: Written, inputs: Tensor) -> Tensor:
    return model.b(input=torch.tanh(model.a(input=inputs)))


def branches(model: Written, inputs: Tensor) -> Tensor:
    """Both begin the graph, as keys and values of a caption do."""
    return F.silu(model.a(inputs), inplace=True) * F.relu(model.b(inputs), inplace=True)


def input_changed_before(model: Written, inputs: Tensor) -> Tensor:
    hidden = model.a(inputs)
    hidden.sin_()
    return torch.sin(model.b(hidden))


def one_is_not_used(model: Written, inputs: Tensor) -> Tensor:
    model.b(inputs)
    return torch.sin(model.a(inputs))


def recomputed(model: Written, inputs: Tensor) -> Tensor:
    hidden: Tensor = checkpoint(lambda values: torch.sin(model.a(values)), inputs, use_reentrant=False)
    return model.b(hidden)


class DoubleRMSNorm(RMSNorm):
    """Diffusers takes the mean square in float32, whatever the input; an oracle in float64 needs its own."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.square().mean(dim=-1, keepdim=True) + self.eps)
        return hidden_states * scale * self.weight


def normed(norm: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 4), norm, nn.SiLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.SiLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.SiLU(inplace=True),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(inplace=True),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear, linear, silu": (lambda: nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3), nn.SiLU(inplace=True)), (5,)),
    "of tokens, whose outputs are views": (
        lambda: nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3), nn.SiLU(inplace=True)),
        (4, 5),
    ),
    "convolutions": (convolutions, (3, 5, 4)),
    "layer norm": (normed(nn.LayerNorm(4)), (3, 4)),
    "root-mean-square norm": (normed(DoubleRMSNorm(4, eps=1e-6)), (3, 4)),
    "group norm": (normed(nn.GroupNorm(1, 4)), (4,)),
    "residual": (two(residual), (5,)),
    "residual of tokens": (two(residual), (4, 5)),
    "scaled": (two(scaled), (4, 5)),
    "part of an output": (two(part_of_an_output), (4, 5)),
    "view of an output": (two(view_of_an_output), (4, 5)),
    "read and then changed": (two(read_and_then_changed), (4, 5)),
    "overwritten in part": (two(overwritten), (4, 5)),
    "by name": (two(by_name), (4, 5)),
    "branches": (two(branches), (4, 5)),
    "input changed before it is read": (two(input_changed_before), (4, 5)),
    "recomputed": (two(recomputed), (4, 5)),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("needs_gradients", [False, True])
def test_a_model_that_changes_outputs_in_place_gets_the_gradients_of_autograd(kind: str, needs_gradients: bool) -> None:
    make, shape = MODELS[kind]
    module = random_weights(make())
    inputs = inputs_of(shape)

    def losses(rows: slice) -> Tensor:
        return losses_of(module(inputs[rows].clone().requires_grad_(needs_gradients)))

    expected = loop(module, losses)
    assert all(float(values.abs().max()) > 1e-3 for values in expected.values())
    assert_same(tapped(module, losses), expected)
    names = list(expected)[-2:]  # the second layer alone: the case
    with PerSampleGradients(module, names) as tap:
        first = dict(tap.per_sample(losses(slice(None))))
        again = dict(tap.per_sample(losses(slice(None))))
    assert_same(first, {name: expected[name] for name in names})
    assert_same(again, first)


def test_an_output_that_no_loss_depends_on_has_a_gradient_of_zero() -> None:
    module, inputs = random_weights(two(one_is_not_used)()), inputs_of((4, 5))
    result = tapped(module, lambda rows: losses_of(module(inputs[rows])))
    assert float(result["b.weight"].abs().max()) == float(result["b.bias"].abs().max()) == 0.0
    assert float(result["a.weight"].abs().max()) > 0.1


def changed_after_reading(model: Written, inputs: Tensor) -> Tensor:
    hidden = torch.sin(inputs)
    result = model.b(hidden)
    hidden.mul_(2.0)
    return model.a(hidden) + result


def changed_through_a_view(model: Written, inputs: Tensor) -> Tensor:
    hidden = torch.sin(model.a(inputs))
    result = model.b(hidden)
    hidden[:, :1] += 1.0
    return hidden + result


@pytest.mark.parametrize("run", [changed_after_reading, changed_through_a_view])
def test_an_input_that_is_changed_after_it_was_read_is_refused_by_name_as_autograd_does(
    run: Callable[[Written, Tensor], Tensor],
) -> None:
    module, inputs = random_weights(two(run)()), inputs_of((4, 5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loop(module, lambda rows: losses_of(module(inputs[rows])))
    module.requires_grad_(False)
    with pytest.raises(ValueError, match=r"for b \(Linear\): the model changes the layer's input in place"):
        tapped(module, lambda rows: losses_of(module(inputs[rows])))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(inputs)))


def test_a_weight_of_two_layers_is_refused_by_both_names_and_the_biases_are_right() -> None:
    module, inputs = random_weights(Tied()), inputs_of((5,))
    with pytest.raises(ValueError, match=r"a\.weight: the layers of a\.weight and b\.weight share this parameter"):
        PerSampleGradients(module, ["a.weight"])

    def losses(rows: slice) -> Tensor:
        return losses_of(module(inputs[rows]))

    expected = {name: values for name, values in loop(module, losses).items() if name.endswith("bias")}
    with PerSampleGradients(module, list(expected)) as tap:
        assert_same(dict(tap.per_sample(losses(slice(None)))), expected)


def without_its_layer(model: Written, inputs: Tensor) -> Tensor:
    return model.b(F.linear(inputs, model.a.weight))


def without_gradients(model: Written, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = model.a(inputs)
    return model.b(hidden)


def without_its_input(model: Written, inputs: Tensor) -> Tensor:
    return model.b(model.a([inputs]))


class OfAList(nn.Linear):
    def forward(self, inputs: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(inputs[0])


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (without_its_layer, "for a: the model does not call this layer"),
        (without_gradients, r"for a \(OfAList\): the model runs it without gradients"),
        (
            without_its_input,
            r"for a \(OfAList\): its first argument should be a tensor, and the model calls it with list",
        ),
    ],
)
def test_what_a_tap_cannot_see_is_refused_by_name(run: Callable[[Written, Tensor], Tensor], said: str) -> None:
    module = random_weights(Written(run, a=OfAList(5, 5), b=nn.Linear(5, 5)))
    with pytest.raises(ValueError, match=said):
        tapped(module.requires_grad_(False), lambda rows: losses_of(module(inputs_of((5,))[rows])))
