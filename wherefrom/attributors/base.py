"""The one interface that all attribution methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, Progress, no_log
from wherefrom.runtime.distributed import Runner

Need = Literal["model", "gradients", "features", "prompt", "trajectory"]


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
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Makes what the method needs once per training set and model, keeps it in the store and finds it again.

        Args:
            data: Training images and the null.
            model: The model, for methods that require one.
            store: Where what is made is kept.
            runner: This process's place.
            log: Receives lines about what is being made.

        Raises:
            ValueError: Something that the method requires is missing.
        """

    @abstractmethod
    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """Scores all training images, or only the candidates, yielding one query at a time as it is ready.

        Raises:
            ValueError: `fit` has not run, or a candidate is not a training image.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""

    def taken_down(self, data: TrainingData, store: Store) -> frozenset[str]:
        """Ids of training images that were taken down, which no ranking may name first any more; none by default."""
        return frozenset()

    def check(self, queries: Sequence[Query]) -> None:
        """Refuses queries that the method cannot attribute, before anything long.

        Raises:
            ValueError: A query asks for a region, and the method knows only whole images.
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
            raise ValueError(f"{len(unknown)} candidates are not training images, such as {unknown[0]!r}.")
        return [where[name] for name in candidates]
