"""The one interface that all attribution methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.data.latents import LatentSet
from wherefrom.data.pictures import Pictures
from wherefrom.diffusion import DiffusionModel, Trajectory
from wherefrom.evaluation.estimates import Estimates
from wherefrom.evaluation.ranking import order_of
from wherefrom.passes import Progress
from wherefrom.regions import Region
from wherefrom.runner import Runner
from wherefrom.storage import Store

Need = Literal["model", "gradients", "features", "prompt", "trajectory"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Query:
    """A picture whose origin is asked for.

    Attributes:
        id: The user's name for it, or a hash of model, prompt and seed.
        prompt: The prompt that made it; empty where it is not known.
        pixels: uint8 RGB, at the size of the training pictures.
        latent: The sampler's last latent where there is one, else the encoded picture; scaled, shape (C, H, W).
        region: The part of the picture that is asked for; None is all of it.
        trajectory: What the sampler predicted on its way, where it was kept.
    """

    id: str
    prompt: str
    pixels: UInt8[NDArray[np.uint8], "h w 3"]
    latent: Float[Tensor, "c h w"] | None = None
    region: Region | None = None
    trajectory: Trajectory | None = None

    @property
    def name(self) -> str:
        """What tells it apart in a run: its id, and the region's name where only a part is asked for."""
        return self.id if self.region is None else f"{self.id}, {self.region.name}"


@dataclass(frozen=True)
class TrainingData:
    """What is attributed to, and what the answers are compared with.

    Attributes:
        pictures: The training pictures.
        latents: The same as the model sees them, for methods that need a model.
        held_out: Pictures never trained on: the null.
        held_out_latents: The same as the model sees them.
    """

    pictures: Pictures
    latents: LatentSet | None = None
    held_out: Pictures | None = None
    held_out_latents: LatentSet | None = None


@dataclass(frozen=True)
class Scores:
    """One query's scores.

    Attributes:
        query: The query.
        ids: Training pictures scored.
        scores: One score a picture, higher = more influential.
        null: Scores of pictures never trained on, by the same method.
        facts: What else was measured, by name (split-half reliability, α, rise, seconds …).
        parts: The same scores from a part of what they were measured on, by its name (a band of timesteps, a caption).
        estimates: What a calibrated fast method says of each picture's influence, in its teacher's unit.
    """

    query: Query
    ids: tuple[str, ...]
    scores: Float[NDArray[np.float64], "n"]
    null: Float[NDArray[np.float64], "m"]
    facts: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, Float[NDArray[np.float64], "n"]] = field(default_factory=dict)
    estimates: Estimates | None = None

    def top(self, count: int) -> list[tuple[str, float]]:
        """The (id, score) pairs of the most influential pictures, the first first."""
        return [
            (self.ids[position], float(self.scores[position])) for position in order_of(self.ids, self.scores)[:count]
        ]


@dataclass(frozen=True)
class Work:
    """The size of a computation before it starts, counted in forward passes (a backward pass counts as two).

    Attributes:
        once: Forward passes once per model and training set.
        per_query: Forward passes for each query.
        disk: Bytes kept on disk.
        memory: Bytes of tensors held in memory beside the model.
    """

    once: int = 0
    per_query: int = 0
    disk: int = 0
    memory: int = 0


def silent(message: str) -> None:
    """Says nothing."""


class Attributor(ABC):
    """A method of attribution: `fit` once, then `score` queries.

    Attributes:
        requires: What the method needs, so that nobody branches on its name.
        takes_regions: Whether a part of a query can be attributed.
        progress: Called with (done, total) while something long runs.
        fit_s: Seconds that parts of the last `fit` took, by name; what was found in the store took little.
    """

    requires: frozenset[Need] = frozenset()
    takes_regions: bool = False
    progress: Progress | None = None
    fit_s: Mapping[str, float] = {}

    def work(self, data: TrainingData, queries: int) -> Work:
        """What the method will have to compute, in passes through the model and bytes on disk; nothing by default."""
        return Work()

    @abstractmethod
    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, say: Say = silent
    ) -> None:
        """Makes what the method needs once per training set and model, keeps it in the store and finds it again.

        Args:
            data: Training pictures and the null.
            model: The model, for methods that require one.
            store: Where what is made is kept.
            runner: This process's place.
            say: Is told what is being made.

        Raises:
            ValueError: Something that the method requires is missing.
        """

    @abstractmethod
    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """Scores all training pictures, or only the candidates, yielding one query at a time as it is ready.

        Raises:
            ValueError: `fit` has not run, or a candidate is not a training picture.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""

    def taken_down(self, data: TrainingData, store: Store) -> frozenset[str]:
        """Ids of training pictures that were taken down, which no ranking may name first any more; none by default."""
        return frozenset()

    def check(self, queries: Sequence[Query]) -> None:
        """Refuses queries that the method cannot attribute, before anything long.

        Raises:
            ValueError: A query asks for a region, and the method knows only whole pictures.
        """
        for query in queries:
            if query.region is not None and not self.takes_regions:
                raise ValueError(
                    f"{type(self).__name__} cannot attribute a region, but query {query.id!r} asks for "
                    f"{query.region.name!r}: leave the region out, or choose a method that differentiates the query's "
                    "loss, such as attribution by unlearning."
                )

    def positions(self, ids: Sequence[str], candidates: Sequence[str] | None) -> list[int]:
        """Where the candidates stand among the ids.

        Raises:
            ValueError: A candidate is unknown.
        """
        if candidates is None:
            return list(range(len(ids)))
        where = {name: index for index, name in enumerate(ids)}
        unknown = [name for name in candidates if name not in where]
        if unknown:
            raise ValueError(f"{len(unknown)} candidates are not training pictures, such as {unknown[0]!r}.")
        return [where[name] for name in candidates]
