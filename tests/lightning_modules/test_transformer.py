"""A transformer that learns by flow matching: trained by the same module, saved as a pipeline, loaded as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel

import train
from tests.support.tiny import LENGTH, text_folder, training_config
from wherefrom.models.conditioning import MASK, PROMPT, Conditioning
from wherefrom.models.families.pixart import PixArtPrompts
from wherefrom.models.families.stable_diffusion_xl import SDXLPrompts
from wherefrom.models.noise_schedule import FlowSchedule
from wherefrom.models.pipeline import load_model, save_pipeline
from wherefrom.runtime import keyed_random
from wherefrom.training.keyed_batches import NOISE, LatentBatch

pytestmark = [
    # The logger has written beside the checkpoints, and a run goes on in another folder.
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
]

TRANSFORMER = {
    "sample_size": 4,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 6,
    "cross_attention_dim": 12,
    "caption_channels": 12,
    "use_additional_conditions": False,
}


def transformer_config(folder: Path, name: str = "run") -> Path:
    """The tiny training with a transformer in place of the U-Net."""
    path = training_config(folder, name)
    config = json.loads(path.read_text())
    model = config["model"]["init_args"]
    model["unet"] = {
        "class_path": "wherefrom.models.factories.transformer_from_config",
        "init_args": {"config": TRANSFORMER},
    }
    model["noise_scheduler"] = {"class_path": "diffusers.FlowMatchEulerDiscreteScheduler"}
    model["save_to"] = str(folder / f"{name} model")
    encoder = config["data"]["init_args"]["encoder"]["init_args"]
    del encoder["length"]
    encoder["text"] = {
        "class_path": "wherefrom.models.families.pixart.masked_captions",
        "init_args": {"path": str(text_folder(folder / "pipeline")), "length": LENGTH},
    }
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """A finished training."""
    folder = tmp_path_factory.mktemp("transformer")
    return folder, train.main(["fit", "-c", str(transformer_config(folder))]).model


def test_what_is_saved_is_what_was_trained(done: tuple[Path, object]) -> None:
    folder, module = done
    model = load_model(str(folder / "run model"))
    assert isinstance(model.denoiser, PixArtTransformer2DModel)
    assert isinstance(model.noise_schedule, FlowSchedule)
    trained = module.ema.state_dict()  # type: ignore[attr-defined]
    for name, value in model.denoiser.state_dict().items():
        torch.testing.assert_close(value, trained[name].half().float())
    assert model.encoder is not None
    text = model.encoder.text
    assert isinstance(text, PixArtPrompts)
    states = text.encode(["a red circle", "a red circle with more words"])[PROMPT]
    assert not torch.equal(states[0], states[1])
    index = json.loads((folder / "run model" / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"][1]) == ("PixArtAlphaPipeline", "FlowMatchEulerDiscreteScheduler")


def test_the_loss_is_that_of_flow_matching(done: tuple[Path, object]) -> None:
    _, module = done
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 4, 4, generator=random)
    states = torch.randn(3, LENGTH + 1, 12, generator=random)[:, :LENGTH]
    conditioning = Conditioning({PROMPT: states, MASK: torch.ones(3, LENGTH)})  # all tokens count
    keys, times = torch.arange(3), torch.tensor([0.1, 0.5, 0.9])
    result = module.recipe.losses(module.ema, LatentBatch(keys, times, latents, conditioning))  # type: ignore[attr-defined]
    noise = keyed_random.normal(keyed_random.combine(NOISE, keys), latents.shape[1:])
    sigmas = FlowMatchEulerDiscreteScheduler().sigmas.flip(0)[(times * 1000).long()]
    level = sigmas[:, None, None, None]
    output = module.ema(  # type: ignore[attr-defined]
        (1 - level) * latents + level * noise,
        encoder_hidden_states=states,
        timestep=sigmas * 1000,
        encoder_attention_mask=torch.ones(3, LENGTH),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    expected = (noise - latents - output).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_it_learns_and_goes_on_from_a_checkpoint(done: tuple[Path, object]) -> None:
    folder, module = done
    again = transformer_config(folder, "again")
    resumed = train.main(["fit", "-c", str(again), "--ckpt_path", str(folder / "run" / "step=4.ckpt")]).model
    for name, value in module.unet.state_dict().items():  # type: ignore[attr-defined]
        torch.testing.assert_close(resumed.unet.state_dict()[name], value)
    start = torch.load(folder / "run" / "step=4.ckpt", weights_only=True)["state_dict"]
    moved = [float((value - start[f"unet.{name}"]).abs().max()) for name, value in module.unet.state_dict().items()]  # type: ignore[attr-defined]
    assert np.max(moved) > 1e-3


def test_what_takes_several_text_encoders_is_not_saved(done: tuple[Path, object], tmp_path: Path) -> None:
    folder, _ = done
    model = load_model(str(folder / "run model"))
    assert model.encoder is not None
    text = model.encoder.text
    assert isinstance(text, PixArtPrompts)
    model.encoder.text = SDXLPrompts(text.models * 2, text.tokenizers * 2, text.lengths * 2, (8, 8))
    with pytest.raises(ValueError, match="only models of one text encoder can"):
        save_pipeline(tmp_path, model, "nowhere")
