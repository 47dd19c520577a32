"""Retrained models, addressed by what decides them, and what each says of a fixed panel of queries.

No model is trained twice, whoever asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.data.image_set import ImageSet
from wherefrom.features.base import ImageEncoder
from wherefrom.gradients.loss_grid import LossGrid, LossPass
from wherefrom.models.diffusion import TRAINING_VERSION, DiffusionModel
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import QuerySource, generate
from wherefrom.queries.types import Query
from wherefrom.runtime.artifacts import MANIFEST, Identity, Store, check_identity, identity_hash, write_manifest

PIPELINE = "pipeline"
_BATCH = 256


@dataclass(frozen=True)
class Retrain:
    """One training run of a recipe.

    Attributes:
        exclude: Ids left out of training.
        seed: Seed of weights, order, timesteps and noise.
    """

    exclude: tuple[str, ...] = ()
    seed: int = 0


# Trains in a folder, going on from what an interrupted run left there, and leaves a diffusers pipeline in `pipeline`.
Train = Callable[[Retrain, Path], None]


class Retrains:
    """Models trained by one recipe on parts of one training set.

    Args:
        store: Where the weights are kept.
        recipe: Everything about training that decides the weights, but for seed and images.
        ids: Ids of the whole training set.
        fingerprint: That of its latents.
        train: Trains one model.
    """

    def __init__(self, store: Store, recipe: Identity, ids: Sequence[str], fingerprint: str, train: Train) -> None:
        self.store, self.recipe, self.ids, self.fingerprint, self.train = store, dict(recipe), ids, fingerprint, train
        self._published: dict[str, Path] = {}

    def identity(self, retrain: Retrain) -> dict[str, Any]:
        """What decides the weights.

        Raises:
            ValueError: An excluded id is not in the training set, or is named twice.
        """
        unknown = sorted(set(retrain.exclude) - set(self.ids))
        if unknown:
            raise ValueError(f"{len(unknown)} ids to leave out are not in the training set, such as {unknown[0]!r}.")
        if len(set(retrain.exclude)) < len(retrain.exclude):
            raise ValueError("An id to leave out is named twice.")
        return {
            "recipe": self.recipe,
            "data": self.fingerprint,
            "excluded": identity_hash({"ids": sorted(retrain.exclude)}),
            "excluded_count": len(retrain.exclude),
            "seed": retrain.seed,
            "training_version": TRAINING_VERSION,
        }

    def name(self, retrain: Retrain) -> str:
        """Hash of the identity."""
        return identity_hash(self.identity(retrain))

    def publish(self, retrain: Retrain, folder: Path) -> None:
        """Uses the weights in a pipeline folder for this model, instead of training it.

        Args:
            retrain: The model.
            folder: A copy of the pipeline that this recipe left for it, on this machine or another.

        Raises:
            ValueError: The folder does not say which retraining left it.
            ArtifactMismatchError: Another recipe, other images or another seed did.
        """
        if not (folder / MANIFEST).exists():
            raise ValueError(
                f"{folder} holds no {MANIFEST}, so nothing says which training left it there. Copy a pipeline folder "
                "that a retraining left in the store, or leave the model out: it is then trained."
            )
        check_identity(folder, self.identity(retrain))
        self._published[self.name(retrain)] = folder

    def has(self, retrain: Retrain) -> bool:
        """Whether the trained weights are there."""
        return self.name(retrain) in self._published or self.store.find("retrain", self.identity(retrain)) is not None

    def model(self, retrain: Retrain) -> DiffusionModel:
        """The trained model, trained now if it is not there.

        Raises:
            ValueError: An id is unknown, or training failed; what it left is gone on from the next time.
            StorageError: The store could not be written.
        """

        def build(partial: Path) -> dict[str, Any]:
            self.train(retrain, partial)
            write_manifest(partial / PIPELINE, self.identity(retrain))
            return {"excluded_ids": sorted(retrain.exclude)}

        published = self._published.get(self.name(retrain))
        if published is not None:
            return load_model(str(published))
        return load_model(str(self.store.make("retrain", self.identity(retrain), build) / PIPELINE))


@dataclass(frozen=True)
class Measurement:
    """What one model says of one query.

    Attributes:
        loss: The query's loss, the mean over the panel's timesteps.
        losses: On each of them, in half precision: many models' must fit into a small table.
        mse: Mean squared difference, pixels from 0 to 1, of the query and what this model draws from its noise.
        similarity: Cosine of the two images' features; NaN without an encoder.
        image: What this model draws; not kept in tables.
    """

    loss: float
    losses: Float[NDArray[np.float16], " t"]
    mse: float
    similarity: float = float("nan")
    image: UInt8[NDArray[np.uint8], "h w 3"] | None = None


class Panel:
    """Queries that every model is measured on: their losses, and what the model draws from their noise.

    Args:
        queries: Queries that were drawn from `source`, in its order. Their order does not decide what is measured.
        model: The model that drew them, whose encoder every other one shares.
        source: How they were drawn.
        timesteps: Timesteps of the losses; 200 are 0, 5, …, 995 (AbU, section 5.1).
        encoder: Compares images by their features also (CLIP in the papers).

    Attributes:
        name: Hash of what decides the measurements of a model.

    Raises:
        ValueError: A query was not drawn, so that it has no noise to draw from again.
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
        told = model.encoder.text.encode([query.prompt for query in self.queries])
        # The mirror images are not measured: the grid has no flips.
        self.data = EncodedImages.of_one_shape(
            images,
            latents=torch.stack([stacked, stacked], dim=1),
            conditioning=told.at(slice(None), None),
            empty=told.at(0).map(torch.zeros_like),
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
        """Query id -> what this model says of it.

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
        """What this model draws from the queries' noise, in their order."""
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
