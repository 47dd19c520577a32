"""The autoencoder whose latents the diffusion model learns: a diffusers `AutoencoderKL` with smooth latents."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float, Int64
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_modules.result import LeavesResult
from lightning_modules.schedule import stepped_per_batch
from wherefrom.runtime import keyed_random
from wherefrom.training.keyed_batches import NOISE, PixelBatch


def roughness(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean squared difference of neighbouring latents over twice their variance in the batch: 1 - their correlation."""
    variance = latents.var(dim=(0, 2, 3), keepdim=True)
    across = ((latents[..., 1:] - latents[..., :-1]) ** 2 / variance).mean(dim=(1, 2, 3))
    down = ((latents[..., 1:, :] - latents[..., :-1, :]) ** 2 / variance).mean(dim=(1, 2, 3))
    return (across + down) / 4


def drawn(mean: Tensor, spread: Tensor, noise: Tensor) -> Tensor:
    """Samples of a normal distribution."""
    return mean + spread * noise


class Autoencoder(LeavesResult):
    """Trains an `AutoencoderKL` on pixels: squared plus absolute error, KL, and smooth latents.

    A small diffusion model learns smooth latents far better than rough ones, so neighbouring latents are asked to be
    alike.

    Args:
        vae: The autoencoder; what is saved has a `scaling_factor` that is set from the data.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the learning-rate schedule, stepped per batch.
        kl_weight: Weight of the KL divergence per latent element.
        smoothness: Weight of `roughness`.
        compile: Compile the autoencoder.
        save_to: Folder to which the trained autoencoder is saved in diffusers' format.
        init_from: A `diffusers` autoencoder folder whose weights to start from.
        decoder_only: Train the decoder alone: latents stay what they are, so a diffusion model of them stays valid.
        latent_noise: Decode latents with Gaussian noise, in place of the posterior's, whose standard deviation is drawn
            for each visit between 0 and this share of the latents' own spread. What a diffusion model draws is never
            quite a training latent, and a decoder that has only seen those turns the difference into texture.
        channels_last: Keep convolution weights channels-last, which is faster on many devices.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        *,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        kl_weight: float = 1e-3,
        smoothness: float = 0.03,
        compile: bool = False,
        save_to: str | None = None,
        init_from: str | None = None,
        decoder_only: bool = False,
        latent_noise: float | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if latent_noise is not None and not (latent_noise > 0 and decoder_only):
            raise ValueError(
                f"latent_noise {latent_noise}: it must be positive, and decoder_only true, since an encoder would "
                "learn to outgrow the noise; leave it out to decode samples of the posterior."
            )
        self.latent_noise = latent_noise
        self.vae = vae.to(memory_format=torch.channels_last) if channels_last else vae
        self.decoder_only = decoder_only
        self.kept_scale: float | None = None
        if init_from is not None:
            source = AutoencoderKL.from_pretrained(init_from, low_cpu_mem_usage=False).float()
            vae.load_state_dict(source.state_dict())
            # A diffusion model was trained on latents of this scale.
            self.kept_scale = source.config.scaling_factor if decoder_only else None
        if decoder_only:
            vae.requires_grad_(False)
            vae.decoder.requires_grad_(True)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.kl_weight, self.smoothness = kl_weight, smoothness
        self.save_to = save_to
        if compile:
            self.vae.encoder.compile()
            self.vae.decoder.compile()

    def training_step(self, batch: PixelBatch) -> Tensor:
        """The mean of the per-example losses, each part logged."""
        with torch.set_grad_enabled(not self.decoder_only):
            posterior = self.vae.encode(batch.pixels).latent_dist
        decoded = self.vae.decode(self.noisy(posterior, batch.keys)).sample
        squared = F.mse_loss(decoded, batch.pixels, reduction="none").mean(dim=(1, 2, 3))
        absolute = F.l1_loss(decoded, batch.pixels, reduction="none").mean(dim=(1, 2, 3))
        kl = posterior.kl() / posterior.mean[0].numel()
        rough = roughness(posterior.mean)
        loss = squared + absolute + self.kl_weight * kl + self.smoothness * rough
        self.log_dict(
            {
                "train/mse": squared.mean(),
                "train/kl": kl.mean(),
                "train/roughness": rough.mean(),
                "train/loss": loss.mean(),
            },
            prog_bar=True,
        )
        total: Tensor = loss.mean()
        return total

    def noisy(self, posterior: DiagonalGaussianDistribution, keys: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """The latents that training decodes; their noise depends only on the visit's key."""
        noise = keyed_random.normal(keys, posterior.mean.shape[1:], posterior.mean.dtype)
        if self.latent_noise is None:
            return drawn(posterior.mean, posterior.std, noise)
        assert self.kept_scale is not None  # scaled latents have a spread of 1
        share = keyed_random.uniform(keyed_random.combine(NOISE, keys))[:, :, None, None].to(noise.dtype)
        return drawn(posterior.mean, self.latent_noise / self.kept_scale * share, noise)

    def validation_step(self, batch: PixelBatch) -> None:
        """Logs the squared error of decoding the mean latent, and the latents' spread and roughness."""
        mean = self.vae.encode(batch.pixels).latent_dist.mean
        decoded = self.vae.decode(mean).sample
        size = len(batch.pixels)
        self.log("val/mse", F.mse_loss(decoded, batch.pixels), batch_size=size, prog_bar=True, sync_dist=True)
        self.log("val/latent_std", mean.std(), batch_size=size, sync_dist=True)
        self.log("val/roughness", roughness(mean).mean(), batch_size=size, sync_dist=True)

    def configure_optimizers(self):  # type: ignore[no-untyped-def]  # noqa: ANN201
        """The injected optimizer, with the injected schedule stepped per batch."""
        optimizer = self.optimizer(parameter for parameter in self.vae.parameters() if parameter.requires_grad)
        return stepped_per_batch(optimizer, self.scheduler)

    def save_result(self) -> None:
        """Sets the scaling factor to one over the latents' spread (a decoder alone keeps its own), and saves."""
        if self.save_to is None or not self.trainer.is_global_zero:
            return
        spread = self.trainer.callback_metrics.get("val/latent_std")
        if spread is None:
            raise ValueError(
                "save_to needs a validation pass, from which the scaling factor is set: do not limit it to 0 batches."
            )
        # As an argument: registered over a value that was left to its default, it would be lost in from_config.
        scale = self.kept_scale if self.kept_scale is not None else round(1.0 / float(spread), 4)
        rounded = AutoencoderKL.from_config(self.vae.config, scaling_factor=scale)
        rounded.load_state_dict(self.vae.state_dict())
        rounded.half().save_pretrained(Path(self.save_to))
