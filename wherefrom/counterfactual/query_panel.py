"""Panel of queries: measures the same losses and generated images on every model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.data.image_set import ImageSet
from wherefrom.features.base import ImageEncoder
from wherefrom.gradients.loss_grid import LossGrid, LossPass
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.sources import QuerySource, generate
from wherefrom.queries.types import Query
from wherefrom.runtime.artifacts import identity_hash

_BATCH = 256


@dataclass(frozen=True)
class Measurement:
    """Measurements of one query on one model.

    Attributes:
        loss: The query's loss, the mean over the panel's timesteps.
        losses: On each of them, in half precision: many models' must fit into a small table.
        mse: Mean squared error, pixels from 0 to 1, of the image that this model draws from the query's noise.
        similarity: Cosine similarity of the two images' features; NaN without an encoder.
        image: The image that this model draws; not kept in tables.
    """

    loss: float
    losses: Float[NDArray[np.float16], " t"]
    mse: float
    similarity: float = float("nan")
    image: UInt8[NDArray[np.uint8], "h w 3"] | None = None


class Panel:
    """Queries that every model is measured on: their losses, and the images that it draws from their noise.

    Args:
        queries: Queries that were drawn from `source`, in its order. Their order does not decide what is measured.
        model: The model that drew them, whose encoder every other one shares.
        source: How they were drawn.
        timesteps: Timesteps of the losses; 200 are 0, 5, …, 995 (AbU, section 5.1).
        encoder: Compares images by their features also (CLIP in the papers).

    Attributes:
        name: Hash of what decides the measurements.

    Raises:
        ValueError: A query is an image file, so that it has no noise to draw from again.
    """

    def __init__(
        self,
        queries: Sequence[Query],
        model: DiffusionModel,
        source: QuerySource,
        timesteps: int = 200,
        encoder: ImageEncoder | None = None,
    ) -> None:
        assert model.encoder is not None
        if source.images or len(queries) != len(source.prompts):
            raise ValueError(
                "A panel's queries are drawn from prompts: an image file has no noise that another model could draw "
                "from. Give queries.prompts only."
            )
        self.queries, self.source, self.encoder = list(queries), source, encoder
        self.grid = LossGrid(timesteps=timesteps, flips=False)
        latents = []
        for query in self.queries:
            assert query.latent is not None
            latents.append(query.latent)
        stacked = torch.stack(latents)
        images = ImageSet(
            tuple(query.id for query in self.queries),
            tuple((query.prompt,) for query in self.queries),
            np.stack([query.pixels for query in self.queries]),
            {},
            identity_hash({"queries": [query.id for query in self.queries]}),
        )
        conditioning = model.encoder.text.encode([query.prompt for query in self.queries])
        # The mirror images are not measured: the grid has no flips.
        self.data = EncodedImages.of_one_shape(
            images,
            latents=torch.stack([stacked, stacked], dim=1),
            conditioning=conditioning.at(slice(None), None),
            empty=conditioning.at(0).map(torch.zeros_like),
            fingerprint=images.fingerprint,
        )
        self.features = None if encoder is None else encoder.encode_images(np.asarray(images.pixels))
        # What decides the measurements of a model; the queries' ids name the sampler.
        identity = {
            "queries": sorted(query.id for query in self.queries),
            "timesteps": timesteps,
            "encoder": None if encoder is None else encoder.identity(),
        }
        self.name = identity_hash(identity)

    def measure(self, model: DiffusionModel) -> dict[str, Measurement]:
        """Query id -> its measurements on this model.

        Raises:
            ValueError: A loss is not finite.
        """
        work = LossPass(model, self.data, self.grid, _BATCH)
        work.step(range(len(self.queries)))
        losses = work.losses.mean(dim=(1, 2, 4)).double().numpy()
        pixels = self.draw(model)
        similarity = np.full(len(pixels), np.nan)
        if self.encoder is not None:
            features = self.encoder.encode_images(pixels)
            assert self.features is not None
            similarity = torch.cosine_similarity(features.double(), self.features.double()).numpy()
        result = {}
        for row, query in enumerate(self.queries):
            difference = (pixels[row].astype(np.float64) - query.pixels) / 255.0
            result[query.id] = Measurement(
                float(losses[row].mean()),
                losses[row].astype(np.float16),
                float(np.square(difference).mean()),
                float(similarity[row]),
                pixels[row],
            )
        return result

    def draw(self, model: DiffusionModel) -> UInt8[NDArray[np.uint8], "q h w 3"]:
        """Images that this model draws from the queries' noise, in their order."""
        source, latent = self.source, self.queries[0].latent
        assert latent is not None
        channels, rows, columns = (int(side) for side in latent.shape)
        drawn = generate(
            model,
            prompts=[query.prompt for query in self.queries],
            seed=source.seed,
            shape=(channels, rows, columns),
            sampling_steps=source.sampling_steps,
            guidance=source.guidance,
            eta=source.eta,
        )
        return np.stack([query.pixels for query in drawn])
