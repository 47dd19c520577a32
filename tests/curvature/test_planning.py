"""What EK-FAC's plan says before fitting begins, held against what fitting does."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support.curvature import DATA, SETTINGS, names_of
from tests.support.tiny import one_process, tiny_model
from wherefrom.curvature import ekfac_plan, fit_ekfac, planning
from wherefrom.curvature.ekfac_passes import CovariancePass, EigenvaluePass
from wherefrom.curvature.fisher_samples import SampledPass
from wherefrom.curvature.kronecker import LayerPlan, plan_layers
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime.artifacts import Store

MIB = 2**20


def matrices() -> int:
    """Bytes of all matrices that are alive in Python and newer than `gc.freeze`."""
    tensors = [value for value in gc.get_objects() if type(value) is Tensor and value.dim() == 2]
    return sum({value.data_ptr(): value.untyped_storage().nbytes() for value in tensors}.values())


def most_held(root: Path, model: DiffusionModel, names: list[str], layers_per_pass: int | None) -> tuple[int, int]:
    """Most bytes of matrices after a batch and when a state is written, and the bytes of the result."""
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, matrices())

    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        for kind, method in ((SampledPass, "step"), (CovariancePass, "state_dict"), (EigenvaluePass, "state_dict")):
            original = getattr(kind, method)

            def watched(self: SampledPass, *arguments: object, original=original) -> object:
                result = original(self, *arguments)
                look()
                return result

            patch.setattr(kind, method, watched)
        fitted = fit_ekfac(
            model,
            data=DATA,
            names=names,
            store=Store(root),
            runner=one_process(),
            settings=SETTINGS,
            layers_per_pass=layers_per_pass,
            batch_size=8,
        )
    gc.unfreeze()
    parts = [part for layer in fitted.layers.values() for part in (layer.activation, layer.gradient, layer.eigenvalues)]
    return most, sum({part.data_ptr(): part.nbytes for part in parts}.values())


def test_layers_per_pass_bounds_memory_as_the_plan_says(tmp_path: Path) -> None:
    model = tiny_model()
    # The largest layers, so that what else a pass holds counts for little.
    names = [name for name in names_of(model, "all") if ".conv1.weight" in name or ".conv2.weight" in name]
    plan = plan_layers(model, DATA, names)
    assert len(plan.layers) > 8
    whole, kept = most_held(tmp_path / "whole", model, names, None)
    assert kept == plan.kept(8)
    assert 0.6 * plan.memory() < whole <= plan.memory()
    block = max(part.memory() for part in plan.blocks(3))
    assert block < plan.memory() / 2
    parts, _ = most_held(tmp_path / "parts", model, names, 3)
    assert 0.6 * block < parts <= block + kept  # what is found stays
    assert parts < whole


def test_the_plan_says_layers_passes_memory_and_time(tmp_path: Path) -> None:
    model, store = tiny_model(), Store(tmp_path)
    names = names_of(model, "cross_attention")
    plan = plan_layers(model, DATA, names)
    said = ekfac_plan(model, data=DATA, names=names, settings=SETTINGS, layers_per_pass=4, store=store)
    blocks = plan.blocks(4)
    assert said.startswith(f"EK-FAC of {len(plan.layers)} layers in {2 * len(blocks)} passes over 16 samples, ")
    memory = max(block.memory() for block in blocks) / MIB
    assert f"{memory:,.0f} MiB of factors at a time and {plan.kept(8) / MIB:,.0f} MiB in the end, " in said
    assert re.search(r"in the end, about \d+ (s|min)$", said)
    assert not any(tmp_path.iterdir())
    fit_ekfac(model, data=DATA, names=names, store=store, runner=one_process(), settings=SETTINGS, layers_per_pass=4)
    assert ekfac_plan(model, data=DATA, names=names, settings=SETTINGS, layers_per_pass=4, store=store).endswith(
        "in the end, kept from before"
    )
    assert "in the end, about" in ekfac_plan(
        model, data=DATA, names=names, settings=SETTINGS, layers_per_pass=None, store=store
    )
    assert "; the diagonal for" in ekfac_plan(model, data=DATA, names=names_of(model, "all")[-4:], settings=SETTINGS)


class Clock:
    """A clock that goes on by the samples that are added and by the size of what is decomposed, and not by itself."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_estimate_grows_with_samples_and_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Clock(), tiny_model()
    batch, eigh = SampledPass._batch, torch.linalg.eigh

    def slow_batch(self: SampledPass, image: Tensor, flip: Tensor, visit: Tensor) -> None:
        batch(self, image, flip, visit)
        clock.now += len(image) * (10.0 if isinstance(self, CovariancePass) else 30.0)

    def slow_eigh(matrix: Tensor):
        clock.now += 7.0 * len(matrix) ** 3
        return eigh(matrix)

    monkeypatch.setattr(planning.time, "perf_counter", clock)
    monkeypatch.setattr(SampledPass, "_batch", slow_batch)
    monkeypatch.setattr(torch.linalg, "eigh", slow_eigh)
    plan = plan_layers(model, DATA, names_of(model, "cross_attention_kv"))
    sides = [12, *(layer.outputs for layer in plan.layers)]
    samples = len(DATA) * SETTINGS.per_image
    expected = 40.0 * samples + 7.0 * sum(side**3 for side in sides)
    assert planning.fit_seconds(model, DATA, plan, SETTINGS) == pytest.approx(expected)
    shared = planning.fit_seconds(model, DATA, plan, SETTINGS, world_size=4)
    assert shared == pytest.approx(expected - 30.0 * samples)
    norms = LayerPlan((), tuple(name for name in names_of(model, "all") if "norm" in name))
    assert planning.fit_seconds(model, DATA, norms, SETTINGS) == pytest.approx(30.0 * samples)


def test_layers_share_an_input_only_if_it_was_not_changed_in_between() -> None:
    model = tiny_model()
    names = names_of(model, "cross_attention_kv")
    assert {layer.sharers for layer in plan_layers(model, DATA, names).layers} == {len(names)}
    keys = [layer for name, layer in model.denoiser.named_modules() if name.endswith("attn2.to_k")]
    handles = [
        layer.register_forward_hook(lambda module, inputs, output: (inputs[0].mul_(1.0), output)[1]) for layer in keys
    ]
    try:
        plan = plan_layers(model, DATA, names)
    finally:
        for handle in handles:
            handle.remove()
    pairs = {layer.module: layer.source for layer in plan.layers}
    assert all(pairs[layer] != pairs[layer.replace("to_v", "to_k")] for layer in pairs if layer.endswith("to_v"))


def test_a_layer_that_the_model_does_not_call_has_no_curvature() -> None:
    model = tiny_model()
    model.denoiser.add_module("spare", nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"does not call spare, so it has no curvature"):
        plan_layers(model, DATA, ["spare.weight"])
