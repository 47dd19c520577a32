"""Trainers' checkpoints: with their base they are the whole pipeline, and without it they say what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.support.pipelines import pixart, stable_diffusion, stable_diffusion_3, stable_diffusion_xl, unet_with
from wherefrom.models.pipeline import LORA, load_model, load_pipeline, model_from_pipeline
from wherefrom.models.single_file import load_single_file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("base"))


def trained(base: Path, *names: str) -> Any:
    """The base after some training of these parts."""
    pipeline: Any = DiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        for name in names:
            for value in pipeline.components[name].parameters():
                value *= 1.01
    return pipeline


def check(folder: Path, base: Path, expected: Any) -> None:
    model, plain = load_model(str(folder), base=str(base)), model_from_pipeline(expected)
    assert model.fingerprint() == plain.fingerprint()
    assert model.encoder is not None
    assert plain.encoder is not None
    assert model.encoder.identity() == plain.encoder.identity()
    assert model.fingerprint() != load_model(str(base)).fingerprint()
    assert model.notes[-1].startswith("Of the base are ")
    assert model.notes[-1].endswith(" and the noise schedule.")


def test_a_checkpoint_of_diffusers_scripts(base: Path, tmp_path: Path) -> None:
    pipeline = trained(base, "unet", "text_encoder")
    folder = tmp_path / "checkpoint-500"
    pipeline.unet.save_pretrained(folder / "unet")
    (folder / "scheduler.bin").write_bytes(b"of the learning rate")
    only_unet = trained(base, "unet")
    check(folder, base, only_unet)
    check(folder / "unet", base, only_unet)  # the network's folder alone
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    check(folder, base, pipeline)
    for given, what in ((folder, "a unet and a text_encoder"), (folder / "unet", "a unet")):
        with pytest.raises(ValueError, match=f"{given} holds {what} and no whole pipeline.*the option 'base'"):
            load_model(str(given))


def test_the_running_average_is_chosen_by_its_name(base: Path, tmp_path: Path) -> None:
    pipeline = trained(base, "unet")
    folder = tmp_path / "checkpoint-500"
    pipeline.unet.save_pretrained(folder / "unet_ema")
    config = json.loads((folder / "unet_ema" / "config.json").read_text())
    # diffusers' EMAModel keeps its own settings in the same file.
    more = {"decay": 0.9999, "optimization_step": 500, "use_ema_warmup": False}
    (folder / "unet_ema" / "config.json").write_text(json.dumps({**config, **more}))
    check(folder, base, pipeline)
    DiffusionPipeline.from_pretrained(base).unet.save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="two networks, unet and its running average unet_ema"):
        load_model(str(folder), base=str(base))
    check(folder / "unet_ema", base, pipeline)


def test_weights_that_accelerate_saved_without_settings(base: Path, tmp_path: Path) -> None:
    pipeline = trained(base, "unet")
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    state = pipeline.unet.state_dict()
    save_file(state, folder / "model.safetensors")
    check(folder, base, pipeline)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    check(folder, base, pipeline)
    (folder / "pytorch_model.bin").unlink()
    for change, message in (
        ({}, "lacks the tensor conv_in.bias"),
        ({"conv_in.bias": torch.ones(9)}, r"conv_in.bias has shape \(9,\)"),
        ({"conv_in.bias": state["conv_in.bias"] * float("nan")}, "no finite numbers"),
        ({"conv_in.bias": state["conv_in.bias"], "more": torch.ones(1)}, "holds besides the tensor more"),
    ):
        others = {name: value for name, value in state.items() if name != "conv_in.bias"}
        save_file(others | change, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_model(str(folder), base=str(base))
    with pytest.raises(ValueError, match=r"holds weights \(model.safetensors\) and no whole pipeline"):
        load_model(str(folder))


@pytest.mark.parametrize("save", [pixart, stable_diffusion_3, stable_diffusion_xl])
def test_networks_of_other_families(save: Callable[[Path], Path], tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    name = "unet" if save is stable_diffusion_xl else "transformer"
    pipeline = trained(base, name)
    pipeline.components[name].save_pretrained(tmp_path / "checkpoint" / name)
    check(tmp_path / "checkpoint", base, pipeline)


def test_a_checkpoint_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    unet_with(cross_attention_dim=20).save_pretrained(tmp_path / "wide" / "unet")  # type: ignore[operator]
    with pytest.raises(ValueError, match="has cross_attention_dim 20, the base 12: it was trained from another"):
        load_model(str(tmp_path / "wide"), base=str(base))
    other = stable_diffusion_3(tmp_path / "sd3")
    shutil.copytree(other / "transformer", tmp_path / "checkpoint" / "transformer")
    with pytest.raises(ValueError, match="is a transformer, which the base does not have"):
        load_model(str(tmp_path / "checkpoint"), base=str(base))
    shutil.copytree(other / "text_encoder", tmp_path / "text" / "text_encoder")
    with pytest.raises(ValueError, match="CLIPTextModelWithProjection, and the base's text_encoder a CLIPTextModel"):
        load_model(str(tmp_path / "text"), base=str(base))


def test_a_tensor_of_a_checkpoint_that_is_missing(base: Path, tmp_path: Path) -> None:
    trained(base, "unet").unet.save_pretrained(tmp_path / "unet")
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["conv_out.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"unet lacks the tensor conv_out.bias"):
        load_model(str(tmp_path), base=str(base))


def test_a_part_of_a_whole_pipeline_names_the_pipeline(base: Path) -> None:
    with pytest.raises(ValueError, match=f"holds a unet of the pipeline {base}: give that folder as the model"):
        load_model(str(base / "unet"))


def test_an_adapters_checkpoint_says_how_it_is_given(base: Path, tmp_path: Path) -> None:
    save_file({"unet.down.lora_A.weight": torch.ones(2)}, tmp_path / LORA)
    for base_given in (None, str(base)):
        with pytest.raises(ValueError, match=f"adapter .LoRA. and no model: .*{LORA} as the option 'lora'"):
            load_model(str(tmp_path), base=base_given)


def test_an_adapter_beside_the_base_is_not_dropped_without_a_word(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    whole = Path(shutil.copytree(base, tmp_path / "base"))
    unet: Any = DiffusionPipeline.from_pretrained(base).unet
    unet.save_pretrained(tmp_path / "checkpoint" / "unet")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    state = peft.utils.get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(whole, unet_lora_layers=state)
    with pytest.raises(ValueError, match=rf"the base {whole} comes with adapters \({LORA}\).* as the option 'lora'"):
        load_model(str(tmp_path / "checkpoint"), base=str(whole))


def test_a_base_may_be_a_single_file_or_a_checkpoint_itself(base: Path, tmp_path: Path) -> None:
    from tests.support.original_names import checkpoint_tensors, save_checkpoint

    file = save_checkpoint(tmp_path / "base.safetensors", checkpoint_tensors(load_pipeline(str(base)), "sd1"))
    with pytest.raises(ValueError, match=r"(is not that|lacks the tensor .*|shape .*) of Stable Diffusion 1"):
        load_single_file(file)  # tiny: not the released model's sizes
    trained(base, "unet").unet.save_pretrained(tmp_path / "checkpoint" / "unet")
    with pytest.raises(ValueError, match="Stable Diffusion 1"):
        load_model(str(tmp_path / "checkpoint"), base=str(file))
