"""The diffusion model: forward process, training loss per example, and sampling from keyed noise.

Shape letters: B = batch, C = latent channels, H and W = latent height and width, L = tokens, D = width of a token
state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from jaxtyping import Float, Int64
from torch import Tensor, nn

from wherefrom import keyed
from wherefrom.parts import LatentEncoder, hash_tensors

Prediction = Literal["epsilon", "v_prediction"]
Output = Literal["loss", "square_output"]

# Raised by hand when the numerics of training change: retrained models of another version are other models.
TRAINING_VERSION = 2

# Salts of the sampler's draws.
_START, _STEP = 101, 102


class ForwardProcess:
    """x_t = √ᾱ_t x + √(1 - ᾱ_t) ε, and what the network is asked to say of it (AbU, section 3).

    Args:
        scheduler: A diffusers scheduler with `alphas_cumprod`; its configuration names the prediction type.

    Raises:
        ValueError: The scheduler is of another kind, or predicts something other than noise or velocity.
    """

    def __init__(self, scheduler: SchedulerMixin) -> None:
        config: Any = scheduler.config
        alphas = getattr(scheduler, "alphas_cumprod", None)
        prediction = getattr(config, "prediction_type", None)
        if alphas is None or prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"{type(scheduler).__name__} with prediction_type {prediction!r} is not supported: the loss needs "
                "`alphas_cumprod` "
                "and a prediction_type of 'epsilon' or 'v_prediction'."
            )
        self.config = dict(config)
        self.prediction: Prediction = prediction
        self.signal = alphas.double().sqrt()
        self.spread = (1 - alphas.double()).sqrt()

    @property
    def steps(self) -> int:
        """T, the number of timesteps."""
        return len(self.signal)

    def scales(self, latents: Float[Tensor, "b c h w"], timesteps: Int64[Tensor, "b"]) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 - ᾱ_t), shaped to multiply the latents."""
        shape = (-1,) + (1,) * (latents.dim() - 1)
        index = timesteps.cpu()
        return (
            self.signal[index].to(latents.device, latents.dtype).reshape(shape),
            self.spread[index].to(latents.device, latents.dtype).reshape(shape),
        )

    def noisy(
        self, latents: Float[Tensor, "b c h w"], timesteps: Int64[Tensor, "b"], noise: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """x_t."""
        signal, spread = self.scales(latents, timesteps)
        return signal * latents + spread * noise

    def target(
        self, latents: Float[Tensor, "b c h w"], timesteps: Int64[Tensor, "b"], noise: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """ε, or v = √ᾱ_t ε - √(1 - ᾱ_t) x."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self.scales(latents, timesteps)
        return signal * noise - spread * latents


class DiffusionModel:
    """A denoiser with its forward process and, where pictures and prompts come in, its encoder.

    Args:
        denoiser: A diffusers `UNet2DConditionModel`, or any module called in the same way.
        process: The forward process that it was trained for.
        encoder: Frozen autoencoder and text encoder.
    """

    def __init__(self, denoiser: nn.Module, process: ForwardProcess, encoder: LatentEncoder | None = None) -> None:
        self.denoiser, self.process, self.encoder = denoiser, process, encoder

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
        """Hash of the weights and of the forward process: two models with the same one give the same losses."""
        process = f"{self.process.prediction}/{hash_tensors({'signal': self.process.signal})}"
        return f"{hash_tensors(self.denoiser.state_dict())}/{process}"

    def predict(
        self, noisy: Float[Tensor, "b c h w"], timesteps: Int64[Tensor, "b"], states: Float[Tensor, "b l d"]
    ) -> Float[Tensor, "b c h w"]:
        """The network's output for x_t."""
        output: Tensor = self.denoiser(noisy, timesteps, encoder_hidden_states=states, return_dict=False)[0]
        return output

    def losses(
        self,
        latents: Float[Tensor, "b c h w"],
        states: Float[Tensor, "b l d"],
        timesteps: Int64[Tensor, "b"],
        noise: Float[Tensor, "b c h w"],
        weights: Float[Tensor, "h w"] | None = None,
    ) -> Float[Tensor, "b"]:
        """l(z; θ, t, ε) of each example: the mean over latent elements of (target - output)², weighted by region."""
        output = self.predict(self.process.noisy(latents, timesteps, noise), timesteps, states)
        return _mean((self.process.target(latents, timesteps, noise) - output).square(), weights)


def _mean(values: Float[Tensor, "b c h w"], weights: Float[Tensor, "h w"] | None) -> Float[Tensor, "b"]:
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
        super().__init__(model.denoiser, model.process, model.encoder)

    def fingerprint(self) -> str:
        """That of the model, marked: its losses are others."""
        return f"{super().fingerprint()}/square output"

    def losses(
        self,
        latents: Float[Tensor, "b c h w"],
        states: Float[Tensor, "b l d"],
        timesteps: Int64[Tensor, "b"],
        noise: Float[Tensor, "b c h w"],
        weights: Float[Tensor, "h w"] | None = None,
    ) -> Float[Tensor, "b"]:
        """The mean over latent elements of output², of each example, weighted by region."""
        output = self.predict(self.process.noisy(latents, timesteps, noise), timesteps, states)
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


@dataclass(frozen=True)
class Trajectory:
    """What a sampler predicted of one picture on its way to it.

    Attributes:
        timesteps: Where the sampler stopped, from noise to picture.
        predicted: x̂₀ predicted at each of them (guidance included); scaled latents.
    """

    timesteps: tuple[int, ...]
    predicted: Float[Tensor, "s c h w"]


@torch.no_grad()
def sample(
    model: DiffusionModel,
    states: Float[Tensor, "b l d"],
    null_states: Float[Tensor, "l d"],
    keys: Int64[Tensor, "b"],
    shape: tuple[int, int, int],
    steps: int = 50,
    guidance: float = 2.0,
    eta: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[int, Float[Tensor, "b c h w"]], None] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Draws latents by DDIM; `eta` = 1 with all timesteps is ancestral (DDPM) sampling.

    The first noise and, where `eta` > 0, each step's noise are keyed, so two models draw from the same seeds.

    Args:
        model: The model to draw from.
        states: Token states of the prompts.
        null_states: Token states of the empty prompt.
        keys: One key for each picture.
        shape: (C, H, W) of a latent.
        steps: Sampling steps.
        guidance: Classifier-free guidance; 1 is none.
        eta: Share of the posterior's noise that each step adds back.
        progress: Called with (done, total) steps.
        watch: Called at each step with its timestep and the latents x̂₀ that it predicts.
    """
    scheduler = sampling_scheduler(model.process)
    scheduler.set_timesteps(steps)
    device, dtype = model.device, model.dtype
    latents = keyed.normal(keyed.combine(_START, keys), shape, dtype).to(device)
    conditions = states.to(device, dtype)
    if guidance != 1.0:
        conditions = torch.cat([conditions, null_states.to(device, dtype).expand_as(conditions)])
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        inputs = latents if guidance == 1.0 else torch.cat([latents, latents])
        output = model.predict(inputs, torch.full((len(inputs),), timestep, device=device), conditions)
        if guidance != 1.0:
            with_prompt, without = output.chunk(2)
            output = without + guidance * (with_prompt - without)
        noise = keyed.normal(keyed.combine(_STEP, keys, index), shape, dtype).to(device) if eta > 0 else None
        stepped: Any = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise)
        latents = stepped.prev_sample
        if watch is not None:
            watch(timestep, stepped.pred_original_sample)
        if progress is not None:
            progress(index + 1, steps)
    return latents


def sampling_scheduler(process: ForwardProcess) -> DDIMScheduler:
    """The DDIM scheduler of a forward process: steps end at the last timestep, latents are not clipped to [-1, 1]."""
    scheduler: DDIMScheduler = DDIMScheduler.from_config(
        process.config, clip_sample=False, set_alpha_to_one=True, steps_offset=1, timestep_spacing="trailing"
    )
    return scheduler
