"""Baselines that need no diffusion model: random scores, and similarity of pixels, image features and captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from wherefrom.attributors.base import Attributor, Need
from wherefrom.attributors.compute_estimate import ComputeStage, feature_stage
from wherefrom.data.image_set import ImageSet
from wherefrom.features.base import ImageEncoder, MiniLMEncoder, TextEncoder, image_features
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pixels import to_float
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.ranges import check_ranges


class _PairwiseBaseline(Attributor):
    """Base of baselines whose score depends on the query and one image only: subclasses define `compare`."""

    data: TrainingData | None = None

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Keeps the images, and calls `prepare` with the training images."""
        self.data = data
        self.prepare(data.images)

    def prepare(self, images: ImageSet) -> None:
        """Precomputes what `compare` needs of these images, such as their vectors; nothing by default."""

    def compare(self, query: Query, images: ImageSet) -> Float[NDArray[np.float64], " n"]:
        """Scores of the images, of shape (N,)."""
        raise TypeError(f"{type(self).__name__} does not compare.")

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """Scores the training images (or candidates) and the held-out images, one query at a time."""
        if self.data is None:
            raise ValueError("fit must run before score.")
        images, held_out = self.data.images, self.data.held_out
        chosen = self.positions(images.ids, candidates)
        for query in queries:
            scores = self.compare(query, images)[chosen]
            null = self.compare(query, held_out) if held_out is not None and len(held_out) else np.empty(0)
            yield Scores(query, tuple(images.ids[index] for index in chosen), scores, null)


class Random(_PairwiseBaseline):
    """Random baseline: uniform scores, keyed by (seed, query id, image id).

    Args:
        seed: Seed of the scores.
    """

    def __init__(self, seed: int = 0) -> None:
        check_ranges(seed=seed)
        self.seed = seed

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {"method": "random", "seed": self.seed}

    def compare(self, query: Query, images: ImageSet) -> Float[NDArray[np.float64], " n"]:
        """Uniform random scores."""
        keys = keyed_random.combine(self.seed, keyed_random.hash_text(query.id), keyed_random.hash_texts(images.ids))
        return keyed_random.uniform(keys)[:, 0].numpy()


class PixelSimilarity(_PairwiseBaseline):
    """Pixel similarity: max over z and its mirror image of cos(ẑ, z), on flattened pixels scaled to [-1, 1].

    Args:
        size: Side length in pixels to which images are resized before comparing; None compares at full size.
    """

    requires: frozenset[Need] = frozenset({"features"})

    def __init__(self, size: int | None = None) -> None:
        check_ranges(size=size)
        self.size = size
        self._vectors: dict[tuple[str, tuple[str, ...]], Tensor] = {}

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {"method": "pixel similarity", "size": self.size}

    def prepare(self, images: ImageSet) -> None:
        """Computes the images' vectors; drops those of an earlier `fit`, except for parts that both sets share."""
        kept = {(part.fingerprint, part.ids) for part in images.parts}
        self._vectors = {key: vectors for key, vectors in self._vectors.items() if key in kept}
        self._unit_vectors(images)

    def _unit_vectors(self, images: ImageSet) -> Float[Tensor, "n d"]:
        parts = images.parts
        if len(parts) > 1:
            return torch.cat([self._unit_vectors(part) for part in parts])
        key = images.fingerprint, images.ids
        if key not in self._vectors:
            by_size = list(images.by_size())
            if self.size is None and len(by_size) > 1:
                raise ValueError(
                    f"Pixels of images of {len(by_size)} sizes cannot be compared with a query's. Set size to the side "
                    "of a square that all are resized to before."
                )
            vectors = [self.vectors(np.asarray(each.pixels)) for _, each, _ in by_size]
            order = np.argsort(np.concatenate([where for _, _, where in by_size])) if len(by_size) > 1 else slice(None)
            self._vectors[key] = torch.cat(vectors)[order] if vectors else torch.zeros(0, 1)
        return self._vectors[key]

    def vectors(self, pixels: NDArray[np.uint8]) -> Float[Tensor, "n d"]:
        """Flattened pixels (after resizing), normalised to unit length, in float64."""
        floats = to_float(torch.from_numpy(np.array(pixels)))
        if self.size is not None:
            floats = F.interpolate(floats, (self.size, self.size), mode="area")
        return F.normalize(floats.double().flatten(1), dim=1)

    def compare(self, query: Query, images: ImageSet) -> Float[NDArray[np.float64], " n"]:
        """Cosine with each image; the larger of query and mirrored query."""
        sizes = images.distinct_sizes
        if len(sizes) == 1 and query.pixels.shape[:2] not in sizes:
            raise ValueError(
                f"Query {query.id!r} has shape {query.pixels.shape}, the training images "
                f"{images.pixels.shape[1:]}: resize it first."
            )
        both = np.stack([query.pixels, query.pixels[:, ::-1]])  # cos(query, mirror(z)) = cos(mirror(query), z)
        return (self._unit_vectors(images) @ self.vectors(both).T).amax(dim=1).numpy()


class ImageSimilarity(Attributor):
    """Image feature similarity (CLIP, DINO, AbC): max over z and its mirror image of cos(f(ẑ), f(z)).

    Args:
        encoder: f, the feature extractor.
        query_encoder: A different extractor for the query, of the same feature width; None is `encoder`. AbC learns
            one head for training images and another for synthesized ones.
    """

    requires: frozenset[Need] = frozenset({"features"})

    def __init__(self, encoder: ImageEncoder, query_encoder: ImageEncoder | None = None) -> None:
        self.encoder, self.query_encoder = encoder, encoder if query_encoder is None else query_encoder
        self._ready: tuple[ImageSet, Tensor, Tensor] | None = None

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {
            "method": "image similarity",
            "encoder": self.encoder.identity(),
            "query_encoder": self.query_encoder.identity(),
        }

    def stages(
        self, data: TrainingData, *, queries: int, name: str, candidates: int | None = None
    ) -> list[ComputeStage]:
        """Encoding of all images and mirror images; the cost of the comparison is negligible."""
        features = feature_stage(self.encoder, data, type(self.encoder).__name__, flips=2)
        return [features, *super().stages(data, queries=queries, name=name, candidates=candidates)]

    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Computes the features of training and held-out images and of their mirror images, cached by encoder."""
        log(f"features of {len(data.images):,} training images and their mirror images")
        empty = torch.zeros(0, 2, 1)
        held_out = data.held_out
        null = self._features(held_out, store) if held_out is not None and len(held_out) else empty
        self._ready = data.images, self._features(data.images, store), null

    def _features(self, images: ImageSet, store: Store) -> Float[Tensor, "n 2 d"]:
        """Unit feature vectors; the second axis is (image, mirror image)."""
        parts = images.parts
        if len(parts) > 1:
            return torch.cat([self._features(part, store) for part in parts])
        by_size = list(images.by_size())
        if len(by_size) > 1:
            order = np.argsort(np.concatenate([where for _, _, where in by_size]))
            return torch.cat([self._features(each, store) for _, each, _ in by_size])[torch.from_numpy(order)]
        mirrored = replace(
            images,
            pixels=np.asarray(images.pixels)[:, :, ::-1],
            fingerprint=f"{images.fingerprint}/mirrored",
        )
        both = [image_features(part, self.encoder, store, self.progress) for part in (images, mirrored)]
        return F.normalize(torch.stack(both, dim=1).double(), dim=2)

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """Scores the training images (or candidates) and the held-out images, one query at a time."""
        if self._ready is None:
            raise ValueError("fit must run before score.")
        images, features, null = self._ready
        chosen = self.positions(images.ids, candidates)
        ids = tuple(images.ids[index] for index in chosen)
        for query in queries:
            vector = F.normalize(self.query_encoder.encode_images(query.pixels[None]).double(), dim=1)[0]
            if vector.shape[0] != features.shape[2]:
                raise ValueError(
                    f"The query's features have {vector.shape[0]} numbers, those of the images {features.shape[2]}: "
                    "the two encoders do not belong together."
                )
            scores = (features[chosen] @ vector).amax(dim=1).numpy()
            yield Scores(query, ids, scores, (null @ vector).amax(dim=1).numpy() if len(null) else np.empty(0))


class CaptionSimilarity(_PairwiseBaseline):
    """Caption similarity (CLIP text, MiniLM): max over an image's captions c of cos(f(prompt), f(c)).

    Args:
        encoder: f, the text encoder; None is MiniLM.
    """

    requires: frozenset[Need] = frozenset({"features", "prompt"})

    def __init__(self, encoder: TextEncoder | None = None) -> None:
        self.encoder: TextEncoder = MiniLMEncoder.from_pretrained() if encoder is None else encoder
        self._vectors: dict[tuple[tuple[str, ...], ...], Tensor] = {}

    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""
        return {"method": "caption similarity", "encoder": self.encoder.identity()}

    def prepare(self, images: ImageSet) -> None:
        """Encodes the captions."""
        self._unit_vectors(images)

    def _unit_vectors(self, images: ImageSet) -> Float[Tensor, "n k d"]:
        """Unit embeddings of the captions, K for each image."""
        parts = images.parts
        if len(parts) > 1:
            return torch.cat([self._unit_vectors(part) for part in parts])
        if images.captions not in self._vectors:
            flat = self.encoder.encode_texts([caption for several in images.captions for caption in several])
            self._vectors[images.captions] = F.normalize(flat.double(), dim=1).unflatten(0, (len(images), -1))
        return self._vectors[images.captions]

    def compare(self, query: Query, images: ImageSet) -> Float[NDArray[np.float64], " n"]:
        """Cosine of the prompt with the nearest caption of each image."""
        prompt = F.normalize(self.encoder.encode_texts([query.prompt]).double(), dim=1)[0]
        return (self._unit_vectors(images) @ prompt).amax(dim=1).numpy()
