"""One step of a latent diffusion recipe in plain PyTorch: keyed noise, loss weights, clipping, schedule, averaging.

The Lightning module calls the parts; `replay` runs whole trainings without Lightning, to the same bits, for methods
that differentiate through a training or repeat a part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.noise_schedule import NoiseSchedule
from wherefrom.runtime import keyed_random
from wherefrom.runtime.ranges import check_ranges
from wherefrom.training.keyed_batches import NOISE, LatentBatch


@dataclass(frozen=True)
class TrainingStep:
    """Loss and weight average of a recipe.

    Attributes:
        noise_schedule: The noise schedule, with what the network predicts.
        max_snr_weight: γ: each velocity loss is weighted by min(1, γ / (SNR + 1)), so that the squared error of the
            image is never weighted by more than γ (as Min-SNR weighting, Hang et al. 2023, but noisy timesteps keep
            their whole weight). None weights all timesteps alike.
        ema_decay: Decay of the weight average per step; it grows from 0 in the first steps.

    Raises:
        ValueError: `max_snr_weight` is not positive or the network does not predict velocity, or `ema_decay` does not
            lie in [0, 1).
    """

    noise_schedule: NoiseSchedule
    max_snr_weight: float | None = None
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        prediction = self.noise_schedule.prediction
        if self.max_snr_weight is not None and not (self.max_snr_weight > 0 and prediction == "v_prediction"):
            raise ValueError(
                f"max_snr_weight {self.max_snr_weight}: it must be positive, and the noise scheduler's prediction_type "
                f"'v_prediction' (it is {prediction!r}); leave it out to weight all timesteps alike."
            )
        check_ranges(ema_decay=self.ema_decay)

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

    def losses(self, network: nn.Module, batch: LatentBatch) -> Float[Tensor, " b"]:
        """One unweighted loss per example; timestep and noise depend only on the visit's key."""
        noise = keyed_random.normal(
            keyed_random.combine(NOISE, batch.keys), batch.latents.shape[1:], batch.latents.dtype
        )
        model = DiffusionModel(network, self.noise_schedule)
        return model.losses(batch.latents, batch.conditioning, self.timesteps(batch), noise)

    def loss(self, network: nn.Module, batch: LatentBatch, step: int) -> Float[Tensor, ""]:
        """The mean of the weighted losses, which a step descends.

        Args:
            network: The network in training.
            batch: The step's batch.
            step: Steps taken before, for the error message.

        Raises:
            ValueError: The loss is not finite.
        """
        losses = self.losses(network, batch)
        loss: Tensor = (losses * self.weights(self.timesteps(batch))).mean().to(losses.dtype)
        if not torch.isfinite(loss):
            raise ValueError(
                f"The training loss is {loss.item()} at step {step}. Lower the learning rate or set "
                "gradient_clip_val; checkpoints written before this step are complete."
            )
        return loss

    @torch.no_grad()
    def average(self, average: nn.Module, network: nn.Module, step: int) -> None:
        """Moves the weight average after a step: θ̄ ← d θ̄ + (1 - d) θ, d = min(decay, (1 + step) / (10 + step)).

        Args:
            average: The averaged network, changed in place.
            network: The network in training.
            step: Steps taken, this one included.
        """
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)


def replay(
    recipe: TrainingStep,
    *,
    network: nn.Module,
    average: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[LatentBatch],
    scheduler: LRScheduler | None = None,
    gradient_clip_norm: float | None = None,
) -> Iterator[float]:
    """Trains in place, without Lightning, and yields each step's loss.

    Args:
        recipe: Loss and weight average.
        network: The network; it is put in training mode.
        average: The averaged network.
        optimizer: Over the network's parameters.
        batches: The batch of each step (`KeyedBatches` says which).
        scheduler: Learning-rate schedule, stepped after each step.
        gradient_clip_norm: Largest norm of the gradient of all parameters together; None clips nothing.

    Raises:
        ValueError: A loss is not finite.
    """
    network.train()
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = recipe.loss(network, batch, step)
        loss.backward()
        if gradient_clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), gradient_clip_norm)
        optimizer.step()
        recipe.average(average, network, step + 1)
        if scheduler is not None:
            scheduler.step()
        yield float(loss.detach())
