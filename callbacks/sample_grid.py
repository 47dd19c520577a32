"""Images drawn from the averaged weights while a model trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from lightning_modules.latent_diffusion import LatentDiffusion
from wherefrom.queries.sources import generate
from wherefrom.runtime.ranges import check_ranges


class SampleGrid(Callback):
    """Draws the same prompts from the same noise after each validation, from the averaged (EMA) weights.

    Args:
        prompts: The prompts.
        folder: Where the grids go, as `step-000500.png`.
        seed: Seed of the noise.
        sampling_steps: Sampling steps.
        guidance: Classifier-free guidance.
    """

    def __init__(
        self, prompts: list[str], folder: str, seed: int = 0, sampling_steps: int = 40, guidance: float = 2.0
    ) -> None:
        check_ranges(seed=seed, sampling_steps=sampling_steps, guidance=guidance)
        self.prompts, self.folder, self.seed = prompts, Path(folder), seed
        self.sampling_steps, self.guidance = sampling_steps, guidance

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws, saves and logs the grid."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        if not isinstance(pl_module, LatentDiffusion):
            raise ValueError(
                f"SampleGrid belongs to LatentDiffusion, not to {type(pl_module).__name__}; take it out of the "
                "callbacks."
            )
        model = pl_module.model()
        channels, rows, columns = pl_module.latent_shape()
        drawn = generate(
            model,
            prompts=self.prompts,
            seed=self.seed,
            shape=(channels, rows, columns),
            sampling_steps=self.sampling_steps,
            guidance=self.guidance,
        )
        grid = np.concatenate([query.pixels for query in drawn], axis=1)
        self.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid).save(self.folder / f"step-{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(
                    "samples", [query.pixels for query in drawn], trainer.global_step, caption=self.prompts
                )
