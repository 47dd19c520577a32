"""What a user of the console command has: a pipeline's folder, a folder of captioned images, and generated images."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from transformers import BertModel

from tests.support.tiny import text_folder, tiny_folder, tiny_pipeline, unet_config
from wherefrom.models.encoders import freeze
from wherefrom.models.factories import unet_from_config

# As few passes as show that everything works.
FEW = {
    "grid.timesteps": 2,
    "unlearning.noise_samples": 16,
    "unlearning.measurement_samples": 16,
    "fisher.samples_per_image": 1,
}
SET = [word for key, value in FEW.items() for word in ("--set", f"{key}={value}")]


@dataclass(frozen=True)
class UserWorld:
    """Paths of a tiny world."""

    model: Path
    images: Path
    generated: Path

    @property
    def words(self) -> list[str]:
        """What every command is given."""
        return ["--model", str(self.model), "--images", str(self.images)]

    @property
    def query(self) -> list[str]:
        """An image with its prompt."""
        return ["--query", str(self.generated), "--prompt", "a red square"]


def movable_unet() -> UNet2DConditionModel:
    """A random U-Net whose loss a step on keys and values can raise by any share.

    Normalisation of a random one makes up for whatever such a step does: here it is weak where activations are small,
    so that the output is small before the step and may grow.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = unet_from_config({**unet_config(), "norm_eps": 100.0})
    with torch.no_grad():
        unet.get_parameter("conv_out.weight").mul_(10.0)
    freeze(unet)
    return unet


def user_world(folder: Path) -> UserWorld:
    """A pipeline that carries its text encoder, 16 training images, 4 others, and one generated image."""
    pipeline = tiny_pipeline(folder / "pipeline", unet=movable_unet())
    BertModel.from_pretrained(text_folder(pipeline)).save_pretrained(pipeline / "text_encoder")
    (pipeline / "text_encoder" / "source.json").unlink()
    shutil.rmtree(text_folder(pipeline))
    images = tiny_folder(folder / "images")
    with Image.open(next((images / "train").glob("*.png"))) as first:
        first.rotate(90).save(folder / "generated.png")
    return UserWorld(pipeline, images, folder / "generated.png")
