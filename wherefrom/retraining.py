"""Retrained models, addressed by what decides them, and what each says of a fixed panel of queries.

No model is trained twice, whoever asks for it. What a panel measures on a model is a row in a small table that outlives
the weights: a sweep goes on from the table alone, and weights may be deleted at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.attributors.base import Query
from wherefrom.data.latents import LatentSet
from wherefrom.data.pictures import Pictures
from wherefrom.diffusion import TRAINING_VERSION, DiffusionModel
from wherefrom.features import ImageEncoder
from wherefrom.losses import LossGrid, LossPass
from wherefrom.pipeline import load_model
from wherefrom.queries import QuerySource, generate
from wherefrom.storage import Identity, Store, identity_hash, replacing

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
        recipe: Everything about training that decides the weights, but for seed and pictures.
        data: The whole training set.
        train: Trains one model.
    """

    def __init__(self, store: Store, recipe: Identity, data: LatentSet, train: Train) -> None:
        self.store, self.recipe, self.data, self.train = store, dict(recipe), data, train

    def identity(self, retrain: Retrain) -> dict[str, Any]:
        """What decides the weights.

        Raises:
            ValueError: An excluded id is not in the training set, or is named twice.
        """
        unknown = sorted(set(retrain.exclude) - set(self.data.ids))
        if unknown:
            raise ValueError(f"{len(unknown)} ids to leave out are not in the training set, such as {unknown[0]!r}.")
        if len(set(retrain.exclude)) < len(retrain.exclude):
            raise ValueError("An id to leave out is named twice.")
        return {
            "recipe": self.recipe,
            "data": self.data.fingerprint,
            "excluded": identity_hash({"ids": sorted(retrain.exclude)}),
            "excluded_count": len(retrain.exclude),
            "seed": retrain.seed,
            "training_version": TRAINING_VERSION,
        }

    def name(self, retrain: Retrain) -> str:
        """Hash of the identity."""
        return identity_hash(self.identity(retrain))

    def has(self, retrain: Retrain) -> bool:
        """Whether the weights are there."""
        return self.store.find("retrain", self.identity(retrain)) is not None

    def model(self, retrain: Retrain) -> DiffusionModel:
        """The trained model, trained now if it is not there.

        Raises:
            ValueError: An id is unknown, or training failed; what it left is gone on from the next time.
            StorageError: The store could not be written.
        """

        def build(partial: Path) -> dict[str, Any]:
            self.train(retrain, partial)
            return {"excluded_ids": sorted(retrain.exclude)}

        return load_model(str(self.store.make("retrain", self.identity(retrain), build) / PIPELINE))


@dataclass(frozen=True)
class Measurement:
    """What one model says of one query.

    Attributes:
        losses: The query's loss on each timestep of the panel.
        mse: Mean squared difference, pixels from 0 to 1, of the query and what this model draws from its noise.
        similarity: Cosine of the two pictures' features; NaN without an encoder.
    """

    losses: Float[NDArray[np.float32], "t"]
    mse: float
    similarity: float = float("nan")

    @property
    def loss(self) -> float:
        """The mean over timesteps."""
        return float(np.mean(self.losses, dtype=np.float64))


class Panel:
    """Queries that every model is measured on: their losses, and what the model draws from their noise.

    Args:
        queries: Queries that were drawn from `source`, in its order.
        model: The model that drew them, whose encoder every other one shares.
        source: How they were drawn.
        timesteps: Timesteps of the losses; 200 are 0, 5, …, 995 (AbU, section 5.1).
        encoder: Compares pictures by their features also (CLIP in the papers).

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
        if source.pictures or len(queries) != len(source.prompts):
            raise ValueError(
                "A panel's queries are drawn from prompts: a picture file has no noise that another model could draw "
                "from. Give queries.prompts only."
            )
        self.queries, self.source, self.encoder = list(queries), source, encoder
        self.grid = LossGrid(timesteps=timesteps, flips=False)
        latents = []
        for query in self.queries:
            assert query.latent is not None
            latents.append(query.latent)
        stacked = torch.stack(latents)
        pictures = Pictures(
            tuple(query.id for query in self.queries),
            tuple((query.prompt,) for query in self.queries),
            np.stack([query.pixels for query in self.queries]),
            {},
            identity_hash({"queries": [query.id for query in self.queries]}),
        )
        states = model.encoder.text.encode([query.prompt for query in self.queries])[:, None]
        # The mirror images are not measured: the grid has no flips.
        self.data = LatentSet(
            pictures,
            torch.stack([stacked, stacked], dim=1),
            states,
            torch.zeros_like(states[0, 0]),
            pictures.fingerprint,
        )
        self.features = None if encoder is None else encoder.encode_images(pictures.pixels)

    def identity(self) -> dict[str, Any]:
        """What decides the measurements of a model; the queries' ids name the sampler."""
        return {
            "queries": [query.id for query in self.queries],
            "timesteps": self.grid.timesteps,
            "encoder": None if self.encoder is None else self.encoder.identity(),
        }

    def measure(self, model: DiffusionModel) -> dict[str, Measurement]:
        """Query id -> what this model says of it.

        Raises:
            ValueError: A loss is not finite.
        """
        work = LossPass(model, self.data, self.grid, _BATCH)
        work.step(range(len(self.queries)))
        losses = work.losses.mean(dim=(1, 2, 4)).float().numpy()
        source, shape = self.source, self.queries[0].latent
        assert shape is not None
        channels, rows, columns = (int(side) for side in shape.shape)
        prompts = [query.prompt for query in self.queries]
        drawn = generate(
            model,
            prompts,
            source.seed,
            (channels, rows, columns),
            source.sampling_steps,
            source.guidance,
            source.eta,
        )
        pixels = np.stack([query.pixels for query in drawn])
        similarity = np.full(len(drawn), np.nan)
        if self.encoder is not None:
            features = self.encoder.encode_images(pixels)
            assert self.features is not None
            similarity = torch.cosine_similarity(features.double(), self.features.double()).numpy()
        found = {}
        for row, query in enumerate(self.queries):
            difference = (pixels[row].astype(np.float64) - query.pixels) / 255.0
            found[query.id] = Measurement(losses[row], float(np.square(difference).mean()), float(similarity[row]))
        return found


class Measurements:
    """The table of what panels measured: one row a model and query, kept as a small parquet file.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, retrain: str, panel: Identity) -> dict[str, Measurement] | None:
        """Query id -> measurement of a model, or None if it was not measured by this panel.

        Args:
            retrain: The model's name.
            panel: The panel's identity.
        """
        if not self.path.exists():
            return None
        rows = pq.read_table(
            self.path, filters=[("retrain", "=", retrain), ("panel", "=", identity_hash(panel))]
        ).to_pylist()
        found = {
            row["query"]: Measurement(np.array(row["losses"], dtype=np.float32), row["mse"], row["similarity"])
            for row in rows
        }
        return found or None

    def add(self, retrain: str, panel: Identity, excluded: int, seed: int, measured: Mapping[str, Measurement]) -> None:
        """Adds a model's rows.

        Args:
            retrain: The model's name.
            panel: The panel's identity.
            excluded: How many pictures it was trained without.
            seed: Its seed.
            measured: Query id -> measurement.

        Raises:
            StorageError: The file could not be written; what it held stays.
        """
        count = len(measured)
        rows = pa.table(
            {
                "retrain": pa.array([retrain] * count, pa.string()),
                "panel": pa.array([identity_hash(panel)] * count, pa.string()),
                "excluded": pa.array([excluded] * count, pa.int64()),
                "seed": pa.array([seed] * count, pa.int64()),
                "query": pa.array(list(measured), pa.string()),
                "losses": pa.array([each.losses.tolist() for each in measured.values()], pa.list_(pa.float32())),
                "mse": pa.array([each.mse for each in measured.values()], pa.float64()),
                "similarity": pa.array([each.similarity for each in measured.values()], pa.float64()),
            }
        )
        kept = [pq.read_table(self.path)] if self.path.exists() else []
        with replacing(self.path) as temporary:
            pq.write_table(pa.concat_tables([*kept, rows]), temporary, compression="zstd")


def measure_retrain(
    retrains: Retrains, retrain: Retrain, panel: Panel, table: Measurements, device: torch.device
) -> dict[str, Measurement]:
    """The panel's measurements of a model, from the table if they are there, else from the model, trained if need be.

    Raises:
        ValueError: Training failed or a loss is not finite.
        StorageError: A file could not be written.
    """
    name = retrains.name(retrain)
    found = table.read(name, panel.identity())
    if found is None:
        found = panel.measure(retrains.model(retrain).to(device))
        table.add(name, panel.identity(), len(retrain.exclude), retrain.seed, found)
    return found
