"""What several benchmarks take: random data of a model's sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.data.image_set import ImageSet
from wherefrom.models.conditioning import PROMPT, prompt_embeddings
from wherefrom.models.diffusion import DiffusionModel


def latent_shape(model: DiffusionModel) -> tuple[int, int, int]:
    """Channels, rows and columns of the model's latents."""
    config: Any = model.denoiser.config
    return int(config.in_channels), int(config.sample_size), int(config.sample_size)


def random_set(model: DiffusionModel, count: int) -> EncodedImages:
    """Random latents and prompt embeddings of the model's sizes: the cost does not depend on their values."""
    assert model.encoder is not None
    _, tokens, width = model.encoder.text.encode([""])[PROMPT].shape
    random = torch.Generator().manual_seed(0)
    images = ImageSet(
        tuple(f"{index:05d}" for index in range(count)),
        (("",),) * count,
        np.zeros((count, 1, 1, 3), np.uint8),
        fingerprint="random",
    )
    return EncodedImages.of_one_shape(
        images,
        latents=torch.randn(count, 2, *latent_shape(model), generator=random),
        conditioning=prompt_embeddings(torch.randn(count, 1, tokens, width, generator=random)),
        empty=prompt_embeddings(torch.zeros(tokens, width)),
        fingerprint="random",
    )
