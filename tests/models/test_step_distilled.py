"""Step-distilled models are warned of: by their scheduler, their name, or their adapter's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline, LCMScheduler, TCDScheduler

from tests.support.pipelines import TRAINED, stable_diffusion
from tests.support.tiny import tiny_unet
from wherefrom.models.adapter_sources import AdapterSource
from wherefrom.models.pipeline import load_model, model_from_pipeline
from wherefrom.models.step_distilled import distilled_by_name, distilled_notes

WARNING = "was not trained by the loss that is measured"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("stabilityai/sdxl-turbo", "sdxl-turbo"),
        ("/data/turbo/my_model", None),
        ("/models/sdxl-turbo/unet", "sdxl-turbo"),
        ("/cache/models--stabilityai--sd-turbo/snapshots/" + "a1" * 20, "models--stabilityai--sd-turbo"),
        ("Hyper-SDXL-8steps-lora.safetensors", "Hyper-SDXL-8steps-lora.safetensors"),
        ("sdxl_lightning_4step_unet.safetensors", "sdxl_lightning_4step_unet.safetensors"),
        ("latent-consistency/lcm-lora-sdv1-5", "lcm-lora-sdv1-5"),
        ("runs/checkpoint-1000-steps", None),
        ("turbocharged-cars", None),
        ("sd15-18steps", None),
        ("", None),
    ],
)
def test_names(place: str, name: str | None) -> None:
    assert distilled_by_name(place) == name
    assert bool(distilled_notes([place])) is (name is not None)


def test_schedulers_and_names_are_noted_once(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path / "plain")
    assert load_model(str(folder)).notes == ()
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    for kind in (LCMScheduler, TCDScheduler):
        pipeline.scheduler = kind(**TRAINED)
        (note,) = model_from_pipeline(pipeline).notes
        assert WARNING in note
        assert kind.__name__ in note
    turbo = shutil.copytree(folder, tmp_path / "sd-turbo")
    (note,) = load_model(str(turbo)).notes
    assert "'sd-turbo'" in note
    (handed,) = model_from_pipeline(DiffusionPipeline.from_pretrained(turbo)).notes
    assert handed == note


def test_an_adapter_of_few_steps_is_noted(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    folder = stable_diffusion(tmp_path / "plain")
    unet: Any = tiny_unet()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    state = peft.utils.get_peft_model_state_dict(unet)
    name = "style_4step.safetensors"
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, weight_name=name)
    model = load_model(str(folder), lora=[AdapterSource(str(tmp_path / name))])
    assert [note for note in model.notes if WARNING in note and name in note]
