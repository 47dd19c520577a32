"""Retrained models, addressed by a hash of what decides their weights: no model is trained twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wherefrom.models.diffusion import TRAINING_VERSION, DiffusionModel
from wherefrom.models.pipeline import load_model
from wherefrom.runtime.artifacts import MANIFEST, Identity, Store, check_identity, identity_hash, write_manifest

PIPELINE = "pipeline"
_INDEX = "model_index.json"


@dataclass(frozen=True)
class RetrainingJob:
    """A training run of a recipe without some of the images.

    Attributes:
        exclude: Ids left out of training.
        seed: Seed of weights, order, timesteps and noise.
    """

    exclude: tuple[str, ...] = ()
    seed: int = 0


# Trains in a folder, resuming what an interrupted run left there, and leaves a diffusers pipeline in `pipeline`.
Train = Callable[[RetrainingJob, Path], None]


class RetrainedModels:
    """Models trained by one recipe on parts of one training set.

    Args:
        store: Where the weights are kept.
        recipe: Everything about training that decides the weights, except seed and images.
        ids: Ids of the whole training set.
        fingerprint: Fingerprint of its latents.
        train: Trains one model.
    """

    def __init__(self, store: Store, recipe: Identity, ids: Sequence[str], fingerprint: str, train: Train) -> None:
        self.store, self.recipe, self.ids, self.fingerprint, self.train = store, dict(recipe), ids, fingerprint, train
        self._published: dict[str, Path] = {}

    def identity(self, job: RetrainingJob) -> dict[str, Any]:
        """Identity of the trained weights.

        Raises:
            ValueError: An excluded id is not in the training set, or is named twice.
        """
        unknown = sorted(set(job.exclude) - set(self.ids))
        if unknown:
            raise ValueError(f"{len(unknown)} ids to leave out are not in the training set, such as {unknown[0]!r}.")
        if len(set(job.exclude)) < len(job.exclude):
            raise ValueError("An id to leave out is named twice.")
        return {
            "recipe": self.recipe,
            "data": self.fingerprint,
            "excluded": identity_hash({"ids": sorted(job.exclude)}),
            "excluded_count": len(job.exclude),
            "seed": job.seed,
            "training_version": TRAINING_VERSION,
        }

    def name(self, job: RetrainingJob) -> str:
        """Hash of the identity: the model's name in the table and in the store."""
        return identity_hash(self.identity(job))

    def publish(self, job: RetrainingJob, folder: Path) -> None:
        """Uses the weights in a pipeline folder for this model instead of training it.

        Args:
            job: The model.
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
        check_identity(folder, self.identity(job))
        self._published[self.name(job)] = folder

    def has(self, job: RetrainingJob) -> bool:
        """Whether the trained weights are there."""
        return self.name(job) in self._published or self.store.find("retrain", self.identity(job)) is not None

    def model(self, job: RetrainingJob) -> DiffusionModel:
        """The trained model, trained now if it is not there.

        Raises:
            ValueError: An id is unknown, or training failed; the next call resumes what it left.
            StorageError: The store could not be written.
        """

        def build(partial: Path) -> dict[str, Any]:
            self.train(job, partial)
            if not (partial / PIPELINE / _INDEX).is_file():
                raise ValueError(f"Training in {partial} ended without leaving a model; run the command again.")
            write_manifest(partial / PIPELINE, self.identity(job))
            return {"excluded_ids": sorted(job.exclude)}

        published = self._published.get(self.name(job))
        if published is not None:
            return load_model(str(published))
        return load_model(str(self.store.make("retrain", self.identity(job), build) / PIPELINE))
