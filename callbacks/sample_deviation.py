"""How far a model that is trained again has gone from the one whose images it is asked about."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer

from lightning_modules.latent_diffusion import LatentDiffusion
from wherefrom.counterfactual.query_panel import Panel
from wherefrom.features.base import ImageEncoder
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import QuerySource, generate
from wherefrom.runtime.ranges import check_ranges


class SampleDeviation(Callback):
    """Logs, after each validation, what retraining does to images of a reference model.

    Means over the images: `deviation/loss` (change of the loss), `deviation/mse` (pixels from 0 to 1, drawn from the
    same noise) and, with an encoder such as CLIP, `deviation/similarity` (AbU, section 5.1). From the averaged (EMA)
    weights.

    Args:
        reference: The pipeline that drew the images: folder or hub id.
        queries: The images, as prompts.
        timesteps: Timesteps of the losses.
        encoder: Compares images by their features also.
    """

    def __init__(
        self, reference: str, queries: QuerySource, timesteps: int = 200, encoder: ImageEncoder | None = None
    ) -> None:
        check_ranges(timesteps=timesteps)
        self.reference, self.queries, self.timesteps, self.encoder = reference, queries, timesteps, encoder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the images and measures the reference model.

        Raises:
            ValueError: The module is another one, or the queries hold image files.
        """
        if not isinstance(pl_module, LatentDiffusion):
            raise ValueError(
                f"SampleDeviation belongs to LatentDiffusion, not to {type(pl_module).__name__}; take it out of the "
                "callbacks."
            )
        if not trainer.is_global_zero:
            return
        model, source = load_model(self.reference).to(pl_module.device), self.queries
        drawn = generate(
            model,
            prompts=source.prompts,
            seed=source.seed,
            shape=pl_module.latent_shape(),
            sampling_steps=source.sampling_steps,
            guidance=source.guidance,
            eta=source.eta,
        )
        self.panel = Panel(drawn, model, source, self.timesteps, self.encoder)
        self.before = self.panel.measure(model)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the averaged model and logs the mean deviations."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, LatentDiffusion)
        after = self.panel.measure(pl_module.model())
        result: dict[str, Any] = {
            "deviation/loss": np.mean([each.loss - self.before[query].loss for query, each in after.items()]),
            "deviation/mse": np.mean([each.mse for each in after.values()]),
        }
        if self.encoder is not None:
            result["deviation/similarity"] = np.mean([each.similarity for each in after.values()])
        for logger in trainer.loggers:
            logger.log_metrics({name: float(value) for name, value in result.items()}, trainer.global_step)
