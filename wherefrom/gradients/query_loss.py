"""The loss of a query: its value and gradient over keyed samples of timestep and noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from wherefrom.models.conditioning import Conditioning
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import Query
from wherefrom.runtime import keyed_random
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.salts import Salt


@dataclass(frozen=True)
class QueryLatent:
    """A query encoded by the diffusion model.

    Attributes:
        id: Its id.
        latent: The scaled latent (C, H, W).
        conditioning: Conditioning of its prompt.
        weights: Share of each latent cell that is inside the region asked for; None is the whole image.
    """

    id: str
    latent: Float[Tensor, "c h w"]
    conditioning: Conditioning
    weights: Float[Tensor, "h w"] | None = None

    @property
    def key(self) -> int:
        """Hash of the id."""
        return keyed_random.hash_text(self.id)


def encode_query(model: DiffusionModel, query: Query) -> QueryLatent:
    """Encodes a query by the model: its latent, the token states of its prompt and the weights of its region.

    Raises:
        ValueError: The model has no encoder.
    """
    encoder = model.encoder
    if encoder is None:
        raise ValueError("The model has no encoder, so it cannot read the query's prompt.")
    latent = query.latent if query.latent is not None else encoder.encode_image(query.pixels)
    height, width = (int(side) for side in query.pixels.shape[:2])
    encoder.text.sized((height, width))  # training images of another size may have come before
    rows, columns = (int(side) for side in latent.shape[1:])
    weights = None if query.region is None else query.region.weights((rows, columns))
    return QueryLatent(query.id, latent, encoder.text.encode([query.prompt]).at(0), weights)


class QueryLoss:
    """L(ẑ; θ), the loss of a query over keyed (t, ε) samples: its value and its gradient.

    Samples are keyed by (seed, query id, step, draw index), and a step's timesteps follow a golden-ratio sequence, so
    they cover the schedule evenly without ever being the same in two steps.

    Args:
        model: The model.
        query: The query.
        seed: Seed of the samples.
        runner: Rank and world size of this process; processes share the samples.
        batch_size: Samples at a time.
    """

    def __init__(
        self, model: DiffusionModel, query: QueryLatent, seed: int, runner: Runner, batch_size: int = 128
    ) -> None:
        self.model, self.query, self.seed, self.runner, self.batch_size = model, query, seed, runner, batch_size

    def _batches(self, salt: int, step: int, noise_samples: int) -> Iterable[Float[Tensor, " b"]]:
        model, device = self.model, self.model.device
        for first in range(self.runner.rank * self.batch_size, noise_samples, self.runner.world_size * self.batch_size):
            draw = torch.arange(first, min(first + self.batch_size, noise_samples))
            latent, timesteps, keys = self.at(salt, step, draw)
            noise = keyed_random.normal(keys.to(device), latent.shape, model.dtype)
            latents = latent.to(device, model.dtype).expand_as(noise)
            conditioning = self.query.conditioning.to(device, model.dtype).expand(len(draw))
            yield model.losses(latents, conditioning, timesteps.to(device), noise, self.query.weights)

    def at(self, salt: int, step: int, draw: Int64[Tensor, " b"]) -> tuple[Tensor, Tensor, Tensor]:
        """The latent whose loss is taken, and the timesteps and noise keys of some samples, by their indices."""
        base = keyed_random.combine(salt, self.seed, self.query.key, step)
        start = float(keyed_random.uniform(keyed_random.combine(Salt.QUERY_TIMESTEP, base))[0])
        time = torch.remainder(start + draw * 0.6180339887498949, 1.0)
        return self.query.latent, (time * self.model.noise_schedule.steps).long(), keyed_random.combine(base, draw)

    @torch.no_grad()
    def value(self, noise_samples: int) -> float:
        """Mean loss over samples that are the same at every call, so that two sets of weights can be compared."""
        total = torch.zeros((), dtype=torch.float64)
        for losses in self._batches(Salt.QUERY_VALUE_NOISE, 0, noise_samples):
            total += losses.double().sum().cpu()
        return float(self.runner.sum(total.to(self.model.device))) / noise_samples

    def gradient(self, parameters: Mapping[str, nn.Parameter], step: int, noise_samples: int) -> dict[str, Tensor]:
        """∇L(ẑ; θ) with respect to the parameters, over this step's samples."""
        totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for losses in self._batches(Salt.QUERY_GRADIENT_NOISE, step, noise_samples):
            for total, gradient in zip(
                totals.values(), torch.autograd.grad(losses.sum(), list(parameters.values())), strict=True
            ):
                total += gradient
        return {name: self.runner.sum(total) / noise_samples for name, total in totals.items()}
