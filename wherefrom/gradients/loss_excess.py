"""Loss of a query beside those of training images, to recognize images that the model cannot represent.

Such an image is not the model's own, and unlearning it moves the weights in directions that are unrelated to the
training images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossGrid, measure_losses
from wherefrom.models.conditioning import Conditioning
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Progress
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.salts import Salt

FAR_OUT = 3.0  # interquartile ranges above the upper quartile (Tukey, Exploratory Data Analysis, 1977, section 2D)
_GRID = LossGrid(timesteps=10, flips=False)
_IMAGES, _DRAWS = 256, 20


def typical_losses(
    model: DiffusionModel, data: EncodedImages, store: Store, runner: Runner, progress: Progress | None = None
) -> Float[NDArray[np.float64], " m"]:
    """The losses of up to 256 training images, chosen by their ids, each the mean over ten timesteps.

    Args:
        model: The model.
        data: The training images.
        store: Where the losses are kept.
        runner: Rank and world size of this process.
        progress: Called with (done, total) chunks.

    Raises:
        ValueError: A loss is not finite.
        StorageError: The store could not be written.
    """
    chosen = data.subset(data.sample(_IMAGES))
    losses = measure_losses(model, data=chosen, grid=_GRID, store=store, runner=runner, progress=progress)
    return losses.double().flatten(1).mean(dim=1).numpy()


@torch.no_grad()
def loss_of(model: DiffusionModel, latent: Float[Tensor, "c h w"], conditioning: Conditioning, seed: int = 0) -> float:
    """The image's loss with its prompt, the mean over the same timesteps and twenty noise samples of each.

    Args:
        model: The model.
        latent: The scaled latent.
        conditioning: Conditioning of its prompt.
        seed: Seed of the noise samples.
    """
    device = model.device
    timesteps = _GRID.steps(model.noise_schedule.steps).repeat_interleave(_DRAWS)
    keys = keyed_random.combine(Salt.LOSS_EXCESS_NOISE, seed, torch.arange(len(timesteps)))
    noise = keyed_random.normal(keys, latent.shape, model.dtype).to(device)
    latents = latent.to(device, model.dtype).expand_as(noise)
    conditions = conditioning.to(device, model.dtype).expand(len(noise))
    return float(model.losses(latents, conditions, timesteps.to(device), noise).double().mean())


def excess(loss: float, typical: Sequence[float] | Float[NDArray[np.float64], " m"]) -> float:
    """How far a loss lies above the typical ones: in their interquartile ranges, from their upper quartile."""
    lower, upper = np.quantile(np.asarray(typical), (0.25, 0.75))
    return float((loss - upper) / (upper - lower)) if upper > lower else float(np.sign(loss - upper)) * np.inf
