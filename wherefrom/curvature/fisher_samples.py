"""Keyed per-sample training losses, which every form of the Fisher information averages over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.per_sample import PerSampleGradients
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime import keyed_random
from wherefrom.runtime.ranges import check_ranges
from wherefrom.runtime.salts import Salt

_NOT_FINITE = "The gradient of {!r} is not finite: check the model's weights and latents."


@dataclass(frozen=True)
class FisherSettings:
    """How the Fisher information is sampled.

    Attributes:
        samples_per_image: Samples per image and flip, each with one timestep, one noise and one caption.
        seed: Seed of these.
        flips: Also pass the mirror images.
    """

    samples_per_image: int = 5
    seed: int = 0
    flips: bool = True

    def __post_init__(self) -> None:
        check_ranges(samples_per_image=self.samples_per_image, seed=self.seed)

    @property
    def per_image(self) -> int:
        """Samples of an image and its mirror image."""
        return self.samples_per_image * (2 if self.flips else 1)


def finite(name: str, values: Tensor) -> Tensor:
    """The values.

    Raises:
        ValueError: One is not finite.
    """
    if not torch.isfinite(values).all():
        raise ValueError(_NOT_FINITE.format(name))
    return values


def all_finite(sums: Mapping[str, Float[Tensor, ""]]) -> None:
    """Checks sums over a batch's gradients by name, which one question to the device answers.

    Raises:
        ValueError: One is not finite.
    """
    finite_ones = torch.isfinite(torch.stack(list(sums.values()))).tolist() if sums else []
    for name, fine in zip(sums, finite_ones, strict=True):
        if not fine:
            raise ValueError(_NOT_FINITE.format(name))


def zeros_like_parameters(model: DiffusionModel, names: Sequence[str]) -> dict[str, Tensor]:
    """A float64 zero of each parameter's shape, to sum into."""
    shapes = {name: parameter.shape for name, parameter in model.denoiser.named_parameters()}
    return {name: torch.zeros(shapes[name], dtype=torch.float64, device=model.device) for name in names}


class SampledPass(ABC):
    """A pass over keyed samples; subclasses define the sums (`add`) and hold them (`merge`, `state_dict`).

    The training loss is the weighted mean Σ wᵢ ℓᵢ / Σ wᵢ, wᵢ how often training sees image i: each image's samples
    count wᵢ times in the sums. Losses are therefore given times √wᵢ, so that squares of their gradients are wᵢ-fold.

    Args:
        model: The pretrained model.
        data: Its training images.
        names: Parameters whose layers are tapped.
        settings: How to sample.
        batch_size: Samples at a time; does not change the result.

    Attributes:
        samples: Number of samples added so far, each counted as often as training sees its image.
    """

    def __init__(
        self,
        model: DiffusionModel,
        data: EncodedImages,
        names: Sequence[str],
        settings: FisherSettings,
        batch_size: int,
    ) -> None:
        self.model, self.data, self.names = model, data, list(names)
        self.settings, self.batch_size = settings, batch_size
        self.samples = 0
        self.id_keys, self.weights = data.id_keys, data.weights

    @abstractmethod
    def add(self, tap: PerSampleGradients, losses: Float[Tensor, " b"], roots: Float[Tensor, " b"] | None) -> None:
        """Adds a batch.

        Args:
            tap: Saw the losses computed.
            losses: The batch's losses, times √w.
            roots: √w, for sums of what does not scale with the loss; None where each image is seen once.
        """

    def noise_samples(
        self, image: Int64[Tensor, " b"], flip: Int64[Tensor, " b"], visit: Int64[Tensor, " b"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Timestep, caption and noise key of each sample, keyed by (seed, id, flip, visit)."""
        keys = keyed_random.combine(self.settings.seed, self.id_keys[image], flip, visit)
        # One golden-ratio sequence over an image's visits and flips: its timesteps are spread evenly.
        start = keyed_random.uniform(
            keyed_random.combine(Salt.FISHER_TIMESTEP, self.settings.seed, self.id_keys[image])
        )[:, 0]
        time = torch.remainder(start + (2 * visit + flip) * 0.6180339887498949, 1.0)
        share = keyed_random.uniform(keyed_random.combine(Salt.FISHER_CAPTION, keys))[:, 0]
        caption = (share * self.data.captions_per_image).long()
        noise_keys = keyed_random.combine(Salt.FISHER_NOISE, keys)
        return (time * self.model.noise_schedule.steps).long(), caption, noise_keys

    def step(self, positions: range) -> None:
        """Adds the images at these positions."""
        visits, per_image = self.settings.samples_per_image, self.settings.per_image
        for members in self.data.by_shape(positions):
            for start in range(0, len(members) * per_image, self.batch_size):
                flat = torch.arange(start, min(start + self.batch_size, len(members) * per_image))
                image, item = members[flat // per_image], flat % per_image
                self._batch(image, item // visits, item % visits)

    def losses(
        self, image: Int64[Tensor, " b"], flip: Int64[Tensor, " b"], visit: Int64[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """The loss of each sample."""
        model, device = self.model, self.model.device
        timestep, caption, noise_keys = self.noise_samples(image, flip, visit)
        latents = self.data.latents_at(image, flip).to(device, model.dtype)
        conditioning = self.data.conditioning_at(image, caption).to(device, model.dtype)
        noise = keyed_random.normal(noise_keys.to(device), latents.shape[1:], model.dtype)
        return model.losses(latents, conditioning, timestep.to(device), noise)

    def _batch(self, image: Tensor, flip: Tensor, visit: Tensor) -> None:
        weights = None if self.weights is None else self.weights[image]
        with torch.enable_grad(), PerSampleGradients(self.model.denoiser, self.names) as tap:
            losses = self.losses(image, flip, visit)
            roots = None if weights is None else weights.sqrt().to(losses)
            self.add(tap, losses if roots is None else losses * roots, roots)
        self.samples += len(image) if weights is None else int(weights.sum())
