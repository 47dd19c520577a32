"""Sampling from keyed noise: DDIM, ancestral (DDPM) and the Euler steps of flow matching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from wherefrom.models.conditioning import Conditioning, concatenated
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.noise_schedule import NoiseSchedule as NoiseSchedule
from wherefrom.models.noise_schedule import sampling_scheduler as sampling_scheduler
from wherefrom.runtime import keyed_random
from wherefrom.runtime.salts import Salt

# Salts of the sampler's draws.


@dataclass(frozen=True)
class Trajectory:
    """What a sampler predicted of one image on its way to it.

    Attributes:
        timesteps: Where the sampler stopped, from noise to image.
        predicted: x̂₀ predicted at each of them (guidance included); scaled latents.
    """

    timesteps: tuple[int, ...]
    predicted: Float[Tensor, "s c h w"]


@torch.no_grad()
def sample(
    model: DiffusionModel,
    *,
    conditioning: Conditioning,
    empty: Conditioning,
    keys: Int64[Tensor, " b"],
    shape: tuple[int, int, int],
    steps: int = 50,
    guidance: float = 2.0,
    eta: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[int, Float[Tensor, "b c h w"]], None] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Draws latents by DDIM; `eta` = 1 with all timesteps is ancestral (DDPM) sampling. Flow matching: Euler's steps.

    The first noise and, where `eta` > 0, each step's noise are keyed, so two models draw from the same seeds.

    Args:
        model: The model to draw from.
        conditioning: Conditioning of the prompts.
        empty: Conditioning of the empty prompt.
        keys: One key for each image.
        shape: (C, H, W) of a latent.
        steps: Sampling steps.
        guidance: Classifier-free guidance; 1 is none.
        eta: Share of the posterior's noise that each step adds back.
        progress: Called with (done, total) steps.
        watch: Called at each step with its timestep and the latents x̂₀ that it predicts.

    Raises:
        ValueError: `eta` is above 0 for a model of flow matching.
    """
    sampler = model.noise_schedule.sampler(steps, eta)
    device, dtype = model.device, model.dtype
    latents = keyed_random.normal(keyed_random.combine(Salt.SAMPLER_START, keys), shape, dtype).to(device)
    conditions = conditioning.to(device, dtype)
    if guidance != 1.0:
        conditions = concatenated([conditions, empty.to(device, dtype).expand(conditions.batch_size)])
    for index, (timestep, time) in enumerate(sampler.path):
        inputs = latents if guidance == 1.0 else torch.cat([latents, latents])
        output = model.run(inputs, torch.full((len(inputs),), time, device=device), conditions)
        if guidance != 1.0:
            with_prompt, without = output.chunk(2)
            output = without + guidance * (with_prompt - without)
        noise = (
            keyed_random.normal(keyed_random.combine(Salt.SAMPLER_STEP, keys, index), shape, dtype).to(device)
            if eta > 0
            else None
        )
        latents, predicted = sampler.step(index, output, latents, noise)
        if watch is not None:
            watch(timestep, predicted)
        if progress is not None:
            progress(index + 1, steps)
    return latents
