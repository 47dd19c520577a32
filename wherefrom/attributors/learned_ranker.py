"""Learned ranker (Fast Data Attribution, section 4): attribution as a cosine search in a learned embedding space.

The ranker is a network g distilled from the rankings of an expensive method (see `wherefrom.distillation.teacher_set`).
Training images are embedded once, as unit vectors; those nearest to a query's embedding are the most influential.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.attributors.base import Attributor, Need
from wherefrom.attributors.compute_estimate import ComputeEstimate, ComputeStage, feature_stage
from wherefrom.data.image_set import ImageSet
from wherefrom.distillation.calibration import load_calibration
from wherefrom.distillation.ranker import load_ranker
from wherefrom.features.base import ImageEncoder, TextEncoder, query_features, training_features
from wherefrom.index import (
    Embeddings,
    Index,
    SearchResult,
    build_index,
    embed,
    embed_training_set,
    ranker_identity,
    rows_of,
)
from wherefrom.index.build import KIND, index_identity
from wherefrom.index.contents import read_removed
from wherefrom.index.embeddings import cosines
from wherefrom.metrics.concentration import concentration
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.rankings.estimates import Estimates
from wherefrom.runtime.artifacts import Store, identity_hash, read_manifest
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner

REMOVED = -2.0  # score of images removed from the index: below any cosine, so that they rank last


class LearnedRanker(Attributor):
    """Learned ranker (Fast Data Attribution, section 4): τ(ẑ, z) = cos(g(f(ẑ)), g(f(z))).

    f concatenates the features of frozen image and text encoders: of a training image and its first caption, or of a
    query and its prompt. g is the learned ranker. `score` computes exact cosines with all training images; `search`
    looks up the k nearest in a FAISS index. How often training saw an image is not among what g is told, so a column
    `repeats` has no effect, as with similarities: scores stand for one copy of each image.

    Args:
        ranker: Folder of the ranker; see `save_ranker`.
        encoders: Encoders by the names in the ranker's manifest, which also gives the order of their features.
        index: FAISS's factory string of the index that `search` uses.
        search: FAISS's search settings, such as `nprobe=32`.
        mmap: Memory-map the index instead of loading it.
        gpu: Search on the first GPU.
        calibration: Folder written by `evaluate.py calibrate`. Scores then carry estimates of influence with intervals,
            in the unit of the teacher's scores, and each query the concentration of its influence. The ranking stays
            that of the cosines.

    Raises:
        FileNotFoundError: A folder holds no ranker, or no calibration.
        ValueError: The ranker does not score by cosine, the encoders are not those that it was trained with, or the
            calibration belongs to another ranker.
    """

    requires: frozenset[Need] = frozenset({"features", "prompt"})

    def __init__(
        self,
        ranker: str,
        *,
        encoders: Mapping[str, ImageEncoder | TextEncoder],
        index: str = "Flat",
        search: str = "",
        mmap: bool = True,
        gpu: bool = False,
        calibration: str | None = None,
    ) -> None:
        self.ranker, self.names = load_ranker(Path(ranker))
        self.ranker_identity = ranker_identity(self.ranker, self.names)
        if set(encoders) != set(self.names):
            raise ValueError(
                f"The ranker {ranker} takes features of {', '.join(self.names)}; the encoders given are "
                f"{', '.join(encoders) or 'none'}. Give one encoder for each of its names."
            )
        self.encoders = {name: encoders[name] for name in self.names}
        self.factory, self.settings, self.mmap, self.gpu = index, search, mmap, gpu
        place = None if calibration is None else Path(calibration)
        self.calibration = None if place is None else load_calibration(place, self.ranker, self.names)
        self._calibrated = {} if place is None else {"calibration": read_manifest(place)["curve"]}
        self._ready: tuple[ImageSet, Embeddings, Index, Embeddings | None] | None = None

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        encoders = {name: encoder.identity() for name, encoder in self.encoders.items()}
        return {"method": "fast attribution", "ranker": self.ranker_identity, "encoders": encoders, **self._calibrated}

    def estimate(self, data: TrainingData, queries: int) -> ComputeEstimate:
        """Bytes of embeddings and of an uncompressed index; no passes of a model."""
        return ComputeEstimate(disk=2 * 4 * len(data.images) * int(self.ranker.sizes["outputs"]))

    def stages(
        self, data: TrainingData, *, queries: int, name: str, candidates: int | None = None
    ) -> list[ComputeStage]:
        """Encoding by each encoder, then embeddings and index."""
        features = [feature_stage(encoder, data, each) for each, encoder in self.encoders.items()]
        return features + super().stages(data, queries=queries, name=name, candidates=candidates)

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Computes features, embeddings and index once, or finds them in the store."""
        log(f"embeddings of {len(data.images):,} training images by {' and '.join(self.names)}")
        self.ranker.to(runner.device)
        embeddings = self._embeddings(data.images, store, runner)
        held_out = data.held_out
        null = self._embeddings(held_out, store, runner) if held_out is not None and len(held_out) else None
        log(f"index {self.factory}")
        folder = build_index(
            store,
            runner=runner,
            rows=rows_of(data.images),
            embeddings=embeddings,
            training=self._training(data.images),
            factory=self.factory,
            progress=self.progress,
        )
        index = Index(folder, ranker=self.ranker_identity, search=self.settings, mmap=self.mmap, gpu=self.gpu)
        self._ready = data.images, embeddings, index, null

    def removed(self, data: TrainingData, store: Store) -> frozenset[str]:
        """Images that were removed from the index of this training set; none where no index was built."""
        training, dimension = self._training(data.images), int(self.ranker.sizes["outputs"])
        folder = store.find(
            KIND, index_identity(self.ranker_identity, training=training, factory=self.factory, dimension=dimension)
        )
        return frozenset() if folder is None else frozenset(read_removed(folder, read_manifest(folder)))

    @property
    def index(self) -> Index:
        """The index, to add images to it or remove them.

        Raises:
            ValueError: `fit` has not run.
        """
        return self._fitted()[2]

    def _fitted(self) -> tuple[ImageSet, Embeddings, Index, Embeddings | None]:
        if self._ready is None:
            raise ValueError("fit must run before score and search.")
        return self._ready

    def _training(self, images: ImageSet) -> dict[str, Any]:
        """Identity of the training set: its pixels, ids, captions, columns and encoders."""
        rows = {"captions": images.captions, "columns": {name: list(c) for name, c in images.columns.items()}}
        return {
            "pictures": images.fingerprint,
            "ids": identity_hash({"ids": list(images.ids)}),
            "rows": identity_hash(rows),
            "encoders": {name: encoder.identity() for name, encoder in self.encoders.items()},
        }

    def _embeddings(self, images: ImageSet, store: Store, runner: Runner) -> Embeddings:
        features = [training_features(images, each, store, self.progress) for each in self.encoders.values()]
        training = self._training(images)
        return embed_training_set(
            self.ranker,
            names=self.names,
            features=features,
            training=training,
            store=store,
            runner=runner,
            progress=self.progress,
        )

    def embed_queries(self, queries: Sequence[Query]) -> Embeddings:
        """Unit vectors of queries; each is embedded alone, so that none depends on its batch."""
        rows = [
            torch.cat([query_features(query.pixels[None], [query.prompt], each) for each in self.encoders.values()], 1)
            for query in queries
        ]
        features: Float[Tensor, "q d"] = torch.cat(rows) if rows else torch.empty(0, self.ranker.inputs)
        return Embeddings(embed(self.ranker, features, self.names), self.ranker_identity)

    def search(self, queries: Sequence[Query], k: int) -> list[SearchResult]:
        """The k most influential images of each query, by the index.

        Raises:
            ValueError: `fit` has not run, a query asks for a region, or the index has not k images.
        """
        self.check(queries)
        index = self._fitted()[2]
        return index.search(self.embed_queries(queries), k)

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """One query at a time: exact cosines with all training images, whatever the index.

        Images that were removed from the index come after all others, at `REMOVED`.
        """
        images, embeddings, index, null = self._fitted()
        chosen = self.positions(images.ids, candidates)
        ids = tuple(images.ids[index] for index in chosen)
        vectors = embeddings.vectors if candidates is None else embeddings.vectors[np.asarray(chosen, dtype=np.intp)]
        gone = np.isin(np.asarray(ids), list(index.removed))
        for query in queries:
            vector: NDArray[np.float32] = self.embed_queries([query]).vectors[0]
            scores = cosines(vectors, vector)
            scores[gone] = REMOVED
            estimates = None if self.calibration is None else self.calibration.estimate(scores)
            yield Scores(
                query,
                ids,
                scores,
                np.empty(0) if null is None else cosines(null.vectors, vector),
                {} if estimates is None else _concentration(estimates),
                estimates=estimates,
            )


def _concentration(estimates: Estimates) -> dict[str, float]:
    """Concentration of a query's influence over the training set, for `Scores.facts`."""
    result = concentration(estimates.values)
    shares = {f"influence_of_first_{count}": share for count, share in result.shares.items()}
    return {**shares, "effective_pictures": result.effective}
