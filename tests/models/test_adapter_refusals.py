"""Adapters that do not wholly belong to a model are refused by name, and the model stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import adapters as made_up
from tests.support.adapters import RANK, Parts, kohya, lora, made, save, targets
from tests.support.pipelines import stable_diffusion
from wherefrom.models.adapter_sources import AdapterSource
from wherefrom.models.adapter_states import known_adapters
from wherefrom.models.adapters import adapters_beside, add_adapters, read_adapters
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import LORA, load_model, load_pipeline

KEYS = (".attn2.to_k",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionModel:
    return load_model(str(folder))


@pytest.fixture(scope="module")
def fitting(model: DiffusionModel) -> Parts:
    return kohya(made(targets(model.denoiser, KEYS), lora))


def refused(model: DiffusionModel, path: Path, said: str, weight: float = 1.0) -> None:
    before = model.fingerprint()
    with pytest.raises(ValueError, match=said):
        add_adapters(model, read_adapters([AdapterSource(str(path), weight)]))
    assert model.fingerprint() == before
    assert not known_adapters(model.denoiser)


def first(tensors: Parts, ending: str) -> str:
    return next(name for name in tensors if name.endswith(ending))


def test_a_tensor_without_a_place_is_counted_and_named(model: DiffusionModel, fitting: Parts, tmp_path: Path) -> None:
    count = len(fitting)
    other = {"lora_unet_input_blocks_99_1_proj_in.lora_down.weight": torch.ones(2, 8)}
    said = rf"{count} of {count + 1} tensors of .*a.safetensors fit this model; 'lora_unet_input_blocks_99_1_proj_in"
    refused(model, save(tmp_path / "a.safetensors", {**fitting, **other}), said + r".*another base \(SDXL\?\)")


def test_an_adapter_of_another_base_names_it(model: DiffusionModel, fitting: Parts, tmp_path: Path) -> None:
    wide = {name: torch.ones(RANK, 2048) if "down" in name else value for name, value in fitting.items()}
    file = tmp_path / "a.safetensors"
    refused(model, save(file, wide), rf"0 of {len(wide)} tensors .*another base \(SDXL\?\)")
    said = rf"0 of {len(wide)} tensors .*another base \(sdxl_base_v1-0\)\. Give the base"
    refused(model, save(file, wide, {"ss_base_model_version": "sdxl_base_v1-0<script>"[:14]}), said)


@pytest.mark.parametrize("change", ["no up", "rank", "height", "alpha", "two alphas", "extra", "kind", "text", "twice"])
def test_a_layer_that_is_no_whole_one_is_refused(
    model: DiffusionModel, fitting: Parts, tmp_path: Path, change: str
) -> None:
    tensors = dict(fitting)
    up, down = first(tensors, "lora_up.weight"), first(tensors, "lora_down.weight")
    layer = down.removesuffix(".lora_down.weight")
    if change == "no up":
        del tensors[up]
    elif change == "rank":
        tensors[up] = torch.ones(len(tensors[up]), RANK + 1)
    elif change == "height":
        tensors[up] = torch.ones(len(tensors[up]) + 1, RANK)
    elif change == "alpha":
        del tensors[up], tensors[down]
    elif change == "two alphas":
        tensors[f"{layer}.alpha"] = torch.ones(2)
    elif change == "extra":
        tensors[f"{layer}.oft_blocks"] = torch.ones(2)
    elif change == "kind":
        tensors[f"{layer}.hada_w1_a"] = torch.ones(2, 2)
    elif change == "text":
        tensors["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(RANK, 12)
    else:  # the same layer by another of its names
        name = next(iter(targets(model.denoiser, KEYS)))
        copies = {"A": tensors[down].clone(), "B": tensors[up].clone()}
        tensors |= {f"unet.{name}.lora_{side}.weight": value for side, value in copies.items()}
    fits = len(fitting) - (0 if change in ("text", "twice", "extra") else 3)
    refused(model, save(tmp_path / "a.safetensors", tensors), rf"^{fits} of {len(tensors)} tensors of")


def test_numbers_that_are_not_finite_are_refused(model: DiffusionModel, fitting: Parts, tmp_path: Path) -> None:
    broken = {**fitting, first(fitting, "up.weight"): torch.full_like(fitting[first(fitting, "up.weight")], torch.nan)}
    refused(model, save(tmp_path / "a.safetensors", broken), "numbers that are not finite")


def test_a_norm_is_neither_weighed_nor_laid_on_others(model: DiffusionModel, fitting: Parts, tmp_path: Path) -> None:
    normed = kohya(made(targets(model.denoiser, KEYS), made_up.dora_of_outputs))
    file, other = save(tmp_path / "dora.safetensors", normed), save(tmp_path / "a.safetensors", fitting)
    refused(model, file, "is a DoRA, which has no weight but 1.*Give it without a weight", 0.8)
    fresh = load_model(str(stable_diffusion(tmp_path / "model")))
    with pytest.raises(ValueError, match="Give the DoRA before the other"):
        add_adapters(fresh, read_adapters([AdapterSource(str(other)), AdapterSource(str(file))]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "OFT"}, "peft's kind OFT are not supported"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "sets init_lora_weights to 'pissa'"),
        ({"peft_type": "LORA", "layer_replication": [[0, 1]]}, "sets layer_replication"),
        ({"peft_type": "LORA", "bias": "all"}, "sets bias to 'all'"),
        ({"peft_type": "LORA", "a_setting_of_tomorrow": 3}, "sets a_setting_of_tomorrow"),
        ({"peft_type": "LORA", "alpha_pattern": {"(a+)+$": 3}}, "no name of a layer"),
        ({"peft_type": "LORA", "lora_alpha": "high"}, "lora_alpha should be a number"),
        ([], "should hold peft's settings"),
    ],
)
def test_settings_whose_effect_is_not_known_are_refused(
    model: DiffusionModel, fitting: Parts, tmp_path: Path, settings: Any, said: str
) -> None:
    save(tmp_path / "adapter_model.safetensors", fitting)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    refused(model, tmp_path, said)


def test_what_is_no_adapter_is_refused(model: DiffusionModel, fitting: Parts, tmp_path: Path) -> None:
    refused(
        model,
        save(tmp_path / "a.safetensors", {"model.diffusion_model.x": torch.ones(4, 4, 3, 3)}),
        "a whole model in one",
    )
    refused(model, save(tmp_path / "b.safetensors", {"x.weight": torch.ones(1)}), "is no adapter; .*'x.weight'")
    cut = save(tmp_path / "c.safetensors", fitting)
    cut.write_bytes(cut.read_bytes()[:-20])
    refused(model, cut, "cannot be read as safetensors")


def test_one_adapter_twice_is_refused(model: DiffusionModel, fitting: Parts, tmp_path: Path) -> None:
    file = save(tmp_path / "a.safetensors", fitting)
    copied = shutil.copy(file, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="is given twice"):
        read_adapters([AdapterSource(str(file)), AdapterSource(str(copied), 0.5)])


@pytest.fixture
def beside(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_an_adapter_of_any_name_beside_a_pipeline_is_loaded(
    model: DiffusionModel, fitting: Parts, beside: Path
) -> None:
    save(beside / "my style.safetensors", fitting)
    save(beside / "learned_embeds.safetensors", {"<cat>": torch.ones(12)})
    result = load_model(str(beside))
    assert [each.name for each in known_adapters(result.denoiser)] == ["my style.safetensors"]
    assert result.fingerprint() != model.fingerprint()
    usual = shutil.move(beside / "my style.safetensors", beside / LORA)
    assert load_model(str(beside)).fingerprint() == result.fingerprint()
    named = [AdapterSource(str(usual))]
    assert load_model(str(beside), lora=named).fingerprint() == result.fingerprint()
    assert load_model(str(beside), lora=[AdapterSource(str(usual), 0.5)]).fingerprint() != result.fingerprint()


def test_what_cannot_be_told_beside_a_pipeline_is_refused(fitting: Parts, beside: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save(beside / name, fitting)
    with pytest.raises(ValueError, match=r"several adapters .*a.safetensors, b.safetensors.*option 'lora'"):
        load_pipeline(str(beside))
    (beside / "b.safetensors").unlink()
    save(beside / "v1-5.safetensors", {"model.diffusion_model.x": torch.ones(4, 4, 3, 3)})
    with pytest.raises(ValueError, match=r"a.safetensors lies beside a pipeline and v1-5.safetensors"):
        load_pipeline(str(beside))
    (beside / "a.safetensors").unlink()
    assert (
        "v1-5.safetensors beside the pipeline is a whole model, which is not used" in load_model(str(beside)).notes[0]
    )
    save(beside / "x.safetensors", {"a.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"x.safetensors lies beside a pipeline, and what it is cannot be told"):
        load_pipeline(str(beside))


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "pytorch_lora_weights.pt", "adapter_model.bin"])
def test_a_pickled_adapter_beside_a_pipeline_is_refused(fitting: Parts, beside: Path, name: str) -> None:
    torch.save(fitting, beside / name)
    with pytest.raises(ValueError, match=rf"{name} is a pickle, and nothing is unpickled.*save_file"):
        load_pipeline(str(beside))
    file = save((beside / name).with_suffix(".safetensors"), load_file(save(beside / "x", fitting)))
    (beside / "x").unlink()
    assert [each.path for each in adapters_beside(beside)[0]] == [file]


def test_a_folder_of_an_adapter_alone_is_no_model(fitting: Parts, tmp_path: Path) -> None:
    save(tmp_path / LORA, fitting)
    with pytest.raises(ValueError, match=r"holds an adapter .* and no (pipeline|model).*option 'lora'"):
        load_model(str(tmp_path))
    (tmp_path / LORA).rename(tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"holds an adapter .* and no pipeline.*option 'lora'"):
        load_model(str(tmp_path))


def test_an_adapter_of_a_base_is_not_lost_with_its_network(model: DiffusionModel, fitting: Parts, beside: Path) -> None:
    save(beside / LORA, fitting)
    network: Any = model.denoiser
    network.save_pretrained(beside.parent / "checkpoint-500" / "unet")
    with pytest.raises(ValueError, match=r"comes with adapters \(pytorch_lora_weights.*option 'lora'"):
        load_model(str(beside.parent / "checkpoint-500"), base=str(beside))
    given = load_model(str(beside.parent / "checkpoint-500"), base=str(beside), lora=[str(beside / LORA)])
    assert given.fingerprint() == load_model(str(beside)).fingerprint()
