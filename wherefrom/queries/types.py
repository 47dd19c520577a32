"""Types of attribution: a query, the training data that it is attributed to, and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.data.image_set import ImageSet
from wherefrom.metrics.ties import is_constant
from wherefrom.models.sampling import Trajectory
from wherefrom.queries.generation_metadata import GenerationMetadata
from wherefrom.queries.regions import Region
from wherefrom.rankings.estimates import Estimates
from wherefrom.rankings.ranking_file import order_of


@dataclass(frozen=True)
class Query:
    """An image whose origin is asked for.

    Attributes:
        id: The user's name for it, or a hash of model, prompt and seed.
        prompt: The prompt that made it; empty where it is not known.
        pixels: uint8 RGB, at the size of the training images.
        latent: The sampler's last latent where there is one, else the encoded image; scaled, shape (C, H, W).
        region: The part of the image that is asked for; None is all of it.
        trajectory: What the sampler predicted on its way, where it was kept.
        metadata: What the image file says of how it was made, if anything.
        own_prompt: Whether the prompt is the one that the file says, because none was given.
    """

    id: str
    prompt: str
    pixels: UInt8[NDArray[np.uint8], "h w 3"]
    latent: Float[Tensor, "c h w"] | None = None
    region: Region | None = None
    trajectory: Trajectory | None = None
    metadata: GenerationMetadata | None = None
    own_prompt: bool = False

    @property
    def name(self) -> str:
        """Name that identifies it in a run: its id, and the region's name where only a part is asked for."""
        return self.id if self.region is None else f"{self.id}, {self.region.name}"


@dataclass(frozen=True)
class TrainingData:
    """The training data, and the model that is attributed.

    Attributes:
        images: The training images.
        latents: The same as the model sees them, for methods that need a model.
        held_out: Images never trained on: the null.
        held_out_latents: The same as the model sees them.
    """

    images: ImageSet
    latents: EncodedImages | None = None
    held_out: ImageSet | None = None
    held_out_latents: EncodedImages | None = None


@dataclass(frozen=True)
class Scores:
    """One query's scores.

    Attributes:
        query: The query.
        ids: Training images scored.
        scores: One score an image, higher = more influential.
        null: Scores of images never trained on, by the same method.
        facts: What else was measured, by name (split-half reliability, α, relative loss increase, seconds …).
        parts: The same scores from a part of what they were measured on, by its name (a band of timesteps, a caption).
        estimates: What a calibrated fast method says of each image's influence, in its teacher's unit.
        per_copy: The scores of one copy of each image, where `scores` are of all copies that training saw (`counting`)
            or ranks of such; these compare with the null, whose images are one copy each. None: `scores` do.
    """

    query: Query
    ids: tuple[str, ...]
    scores: Float[NDArray[np.float64], " n"]
    null: Float[NDArray[np.float64], " m"]
    facts: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, Float[NDArray[np.float64], " n"]] = field(default_factory=dict)
    estimates: Estimates | None = None
    per_copy: Float[NDArray[np.float64], " n"] | None = None

    @property
    def comparable(self) -> Float[NDArray[np.float64], " n"]:
        """The scores that the null is compared with: those of one copy of each image."""
        return self.scores if self.per_copy is None else self.per_copy

    def counting(self, weights: Float[NDArray[np.float64], " n"] | None) -> Scores:
        """The scores of the images with all their copies, from those of one copy of each.

        To first order, what is removed adds up: removing an image that training sees wᵢ times removes wᵢ equal terms of
        the objective, so its score is wᵢ times that of one copy.

        Args:
            weights: How often training sees each image; None is once, which changes nothing.
        """
        if weights is None:
            return self
        parts = {name: values * weights for name, values in self.parts.items()}
        return replace(self, scores=self.scores * weights, per_copy=self.scores, parts=parts)

    @property
    def all_equal(self) -> bool:
        """Whether the scores tell no two images apart, as far as their precision can tell: they have no order then."""
        return len(self.ids) > 1 and is_constant(self.scores)

    def __repr__(self) -> str:
        """One line: the query, how many images were scored, and the first."""
        first = f", the first is {self.top(1)[0][0]!r}" if len(self.ids) else ""
        first = ", all scores are equal" if self.all_equal else first
        said = f", {self.query.prompt!r}" if self.query.prompt else ""
        return f"<{type(self).__name__} of {self.query.name!r}{said}: {len(self.ids):,} training images{first}>"

    def top(self, count: int) -> list[tuple[str, float]]:
        """The (id, score) pairs of the most influential images, the first first."""
        return [
            (self.ids[position], float(self.scores[position])) for position in order_of(self.ids, self.scores)[:count]
        ]
