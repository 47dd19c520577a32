"""The diffusion model: training loss per example, and sampling from keyed noise.

Shape letters: B = batch, C = latent channels, H and W = latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from wherefrom.models.adapter_states import with_adapters
from wherefrom.models.allowed_parts import NETWORK, check_part
from wherefrom.models.conditioning import Conditioning
from wherefrom.models.deciding_settings import settings_hash
from wherefrom.models.encoders import LatentEncoder
from wherefrom.models.families.registry import family_of
from wherefrom.models.noise_schedule import NoiseSchedule as NoiseSchedule
from wherefrom.models.noise_schedule import sampling_scheduler as sampling_scheduler
from wherefrom.models.parameter_subsets import adapter_scales
from wherefrom.runtime.artifacts import identity_hash
from wherefrom.runtime.tensor_hash import hash_tensors

Output = Literal["loss", "square_output"]

# Raised by hand when the numerics of training change: retrained models of another version are other models.
TRAINING_VERSION = 3


class DiffusionModel:
    """A denoiser with its forward process and, where images and prompts come in, its encoder.

    Args:
        denoiser: A diffusers U-Net or transformer, or any module called like `UNet2DConditionModel`.
        noise_schedule: The forward process that it was trained for.
        encoder: Frozen autoencoder and text encoder.

    Attributes:
        bf16: Compute gradients in bfloat16 (autocast). Passes without gradients stay as they are: unlearning moves
            weights by less than bfloat16 can hold, so changes of losses drown in rounding (measured on the emoji world:
            Spearman 0.00 with all passes in bfloat16, 0.13 with the moved layers in float32, 0.998 as it is).
        compiled: The compiled network, which passes without gradients go through; None compiles nothing.
        notes: What pages and consoles say of how the model was loaded.
    """

    def __init__(
        self, denoiser: nn.Module, noise_schedule: NoiseSchedule, encoder: LatentEncoder | None = None
    ) -> None:
        self.denoiser, self.noise_schedule, self.encoder = denoiser, noise_schedule, encoder
        self.family = family_of(denoiser)
        self.bf16 = False
        self.compiled: Callable[..., Any] | None = None
        self.notes: tuple[str, ...] = ()

    def accelerate(self, bf16: bool = False, compile: bool = False, checkpoint: bool = False) -> DiffusionModel:
        """Sets what makes passes faster or smaller, none of which should change a ranking.

        Args:
            bf16: See `bf16`.
            compile: Compile the network for passes without gradients; weights may change in place all the same.
            checkpoint: Compute activations again in backward passes instead of keeping them.

        Raises:
            ValueError: The network cannot checkpoint.
        """
        self.bf16 = bf16
        self.compiled = torch.compile(self.denoiser) if compile else None
        if checkpoint:
            network: Any = self.denoiser
            if not getattr(network, "_supports_gradient_checkpointing", False):
                raise ValueError(
                    f"{type(network).__name__} cannot checkpoint gradients: leave gradient_checkpointing out."
                )
            network.enable_gradient_checkpointing()
        return self

    def run(self, noisy: Float[Tensor, "b c h w"], times: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output for x_t, given the time input of the noise schedule."""
        network: Any = self.denoiser if self.compiled is None or torch.is_grad_enabled() else self.compiled
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.bf16 and torch.is_grad_enabled()):
            output = self.family(network, noisy, times, conditioning)
        return output.to(noisy.dtype)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's type of number."""
        return next(self.denoiser.parameters()).dtype

    def to(self, device: torch.device | str) -> DiffusionModel:
        """Moves the denoiser and the encoder's parts."""
        self.denoiser.to(device)
        if self.encoder is not None:
            self.encoder.vae.to(device)
            self.encoder.text.model.to(device)
        return self

    def fingerprint(self) -> str:
        """Hash of weights, forward process and precision: two models with the same one give the same losses.

        Raises:
            ValueError: The network does not compute what its weights say; see `check_part`.
        """
        check_part(self.denoiser, NETWORK)
        process = identity_hash(self.noise_schedule.identity())
        schedule = f"{self.noise_schedule.prediction}/{process}{'/bf16' if self.bf16 else ''}"
        scales = adapter_scales(self.denoiser)
        adapters = f"/{identity_hash(scales)}" if scales else ""
        settings = settings_hash(self.denoiser)
        unusual = f"/settings {settings}" if settings else ""
        return f"{hash_tensors(self.denoiser.state_dict())}/{schedule}{adapters}{unusual}"

    def description(self) -> str:
        """The fingerprint, and the adapters that change what the model computes, for pages."""
        return with_adapters(self.fingerprint(), self.denoiser)

    def predict(
        self, noisy: Float[Tensor, "b c h w"], timesteps: Int64[Tensor, " b"], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """The network's output for x_t."""
        return self.run(noisy, self.noise_schedule.times(timesteps), conditioning)

    def check(self, latent: Float[Tensor, "c h w"], conditioning: Conditioning) -> None:
        """Refuses a latent and a caption's conditioning that are not the model's, before anything long.

        Raises:
            ValueError: Their names or shapes are not what the network takes, or the network does not compute what its
                weights say.
        """
        check_part(self.denoiser, NETWORK)
        channels, rows, columns = (int(side) for side in latent.shape)
        self.family.check((channels, rows, columns), conditioning)

    def losses(
        self,
        latents: Float[Tensor, "b c h w"],
        conditioning: Conditioning,
        timesteps: Int64[Tensor, " b"],
        noise: Float[Tensor, "b c h w"],
        weights: Float[Tensor, "h w"] | None = None,
    ) -> Float[Tensor, " b"]:
        """l(z; θ, t, ε) of each example: the mean over latent elements of (target - output)², weighted by region."""
        output = self.predict(self.noise_schedule.noisy(latents, timesteps, noise), timesteps, conditioning)
        return _mean((self.noise_schedule.target(latents, timesteps, noise) - output).square(), weights)


def _mean(values: Float[Tensor, "b c h w"], weights: Float[Tensor, "h w"] | None) -> Float[Tensor, " b"]:
    """The mean over all elements, or over cells by their weights, of each example."""
    if weights is None:
        return values.flatten(1).mean(dim=1)
    shares = (weights / weights.sum()).to(values.device, values.dtype)
    return (values.mean(dim=1) * shares).flatten(1).sum(dim=1)


class SquareOutput(DiffusionModel):
    """The same model with the mean square of its output in place of its loss: the output function of D-TRAK.

    Args:
        model: The model, whose parts it shares.
    """

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__(model.denoiser, model.noise_schedule, model.encoder)
        self.bf16, self.compiled, self.notes = model.bf16, model.compiled, model.notes

    def fingerprint(self) -> str:
        """The model's fingerprint, marked: its losses differ."""
        return f"{super().fingerprint()}/square output"

    def losses(
        self,
        latents: Float[Tensor, "b c h w"],
        conditioning: Conditioning,
        timesteps: Int64[Tensor, " b"],
        noise: Float[Tensor, "b c h w"],
        weights: Float[Tensor, "h w"] | None = None,
    ) -> Float[Tensor, " b"]:
        """The mean over latent elements of output², of each example, weighted by region."""
        output = self.predict(self.noise_schedule.noisy(latents, timesteps, noise), timesteps, conditioning)
        return _mean(output.square(), weights)


def check_output(output: str) -> None:
    """Refuses an output function that there is not.

    Raises:
        ValueError: It is unknown.
    """
    if output not in ("loss", "square_output"):
        raise ValueError(f"Unknown output {output!r}; choose 'loss' or 'square_output'.")


def with_output(model: DiffusionModel, output: Output) -> DiffusionModel:
    """The model itself, or with the mean square of its output in place of its loss."""
    return SquareOutput(model) if output == "square_output" else model
