"""Re-attribution: the same queries attributed again, under a model that was trained without the removed images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.attributors.base import Attributor
from wherefrom.commands.attribute import attribute, run_identity
from wherefrom.counterfactual.retraining import RetrainedModels, RetrainingJob
from wherefrom.data.image_set import keep_indices
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.rankings.ranking_file import read_ranking
from wherefrom.reports.query_section import ReportOptions
from wherefrom.runtime.artifacts import MANIFEST, Store, check_identity, identity_hash, read_manifest
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.keyed_random import hash_text

_FOLDER, _FOLDER_BEFORE = "reattribution", "after"


def reattribution_folder(run: Path) -> Path:
    """The folder of a run with its re-attributions, by the name that an earlier release gave it if it is there."""
    before = run / _FOLDER_BEFORE
    return before if before.exists() else run / _FOLDER


class Reattribution:
    """Attributes queries under retrained models, among the images that these were trained on.

    Each run has a folder, named by model and method. A finished run is read without its model, whose weights may have
    been deleted; an interrupted one resumes.

    Args:
        folder: Where the run folders go.
        methods: Name -> method.
        data: The whole training set, and the held-out images.
        models: The models.
        queries: The queries, as the model with all images drew them.
        store: Where methods keep their artifacts.
        runner: This process's place.
        options: Contents of the runs' pages.
        log: Receives lines about the progress.
    """

    def __init__(
        self,
        folder: Path,
        *,
        methods: Mapping[str, Attributor],
        data: TrainingData,
        models: RetrainedModels,
        queries: Sequence[Query],
        store: Store,
        runner: Runner,
        options: ReportOptions = ReportOptions(),
        log: Log = no_log,
    ) -> None:
        self.folder, self.methods, self.data, self.models = folder, methods, data, models
        self.queries = {query.id: query for query in queries}
        self.store, self.runner, self.options, self.log = store, runner, options, log

    def uses_model(self, method: str) -> bool:
        """Whether another model can change this method's ranking of the same images."""
        return "model" in self.methods[method].requires

    def __call__(self, method: str, job: RetrainingJob, queries: Sequence[str]) -> dict[str, list[str]]:
        """Query -> ids of the images that the model was trained on, the most influential first.

        Args:
            method: The method's name.
            job: The model.
            queries: Ids of the queries.

        Raises:
            ArtifactMismatchError: The run folder holds a run of other images or of a method with other settings.
            ValueError: Training failed, or the method cannot attribute a query.
            StorageError: A file could not be written; finished queries are kept.
        """
        asked = [self.queries[query] for query in sorted(queries)]
        data, attributor = self.remaining(job), self.methods[method]
        identity = run_identity(attributor, data, None, asked, self.store)
        place = self.run_folder(method, job, identity["queries"])
        manifest = read_manifest(place) if (place / MANIFEST).exists() else {}
        if manifest.get("complete"):
            # The folder's name decides the model.
            check_identity(place, {**identity, "model": manifest["identity"]["model"]})
            return {query: _with_ties_by_hash(*ranking) for query, ranking in read_ranking(place).items()}
        self.log(f"re-attribution by {method}, without {len(job.exclude)} images")
        model = self.models.model(job).to(self.runner.device)
        results = attribute(
            place,
            attributor=attributor,
            data=data,
            model=model,
            queries=asked,
            store=self.store,
            runner=self.runner,
            options=self.options,
            log=self.log,
        )
        return {scores.query.id: _with_ties_by_hash(scores.ids, scores.scores) for scores in results}

    def remaining(self, job: RetrainingJob) -> TrainingData:
        """The images that the model was trained on.

        Raises:
            ValueError: An excluded id is not in the training set.
        """
        kept = keep_indices(self.data.images.ids, job.exclude)
        latents = None if self.data.latents is None else self.data.latents.subset(kept)
        return TrainingData(self.data.images.subset(kept), latents, self.data.held_out, self.data.held_out_latents)

    def run_folder(self, method: str, job: RetrainingJob, queries: Any) -> Path:
        """The run folder.

        Two query groups may name the same images, and so the same model: the second has a folder of its own.
        """
        place = self.folder / self.models.name(job) / method
        if (place / MANIFEST).exists() and read_manifest(place)["identity"].get("queries") != queries:
            return place.with_name(f"{method} {identity_hash({'queries': queries})}")
        return place


def whole_ranking(scores: Scores) -> list[str]:
    """All ids, the most influential first."""
    return [name for name, _ in scores.top(len(scores.ids))]


def _with_ties_by_hash(ids: Sequence[str], scores: Float[NDArray[np.float64], " n"]) -> list[str]:
    """All ids, the most influential first; ties by a hash of the id.

    The ranking that this one is compared with breaks ties by the id itself. If both did, two rankings that tell no
    images apart would agree.
    """
    keys = np.array([hash_text(f"tie/{name}") for name in ids])
    return [ids[position] for position in np.lexsort((keys, -scores))]
