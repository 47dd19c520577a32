"""`Attributor`, the interface of all attribution methods.

A method gives each training image z a score τ(ẑ, z) for each query ẑ (a generated image and its prompt): the higher,
the more influential. It also scores held-out images, which the model never trained on; their scores are the null
distribution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from wherefrom.attributors.compute_estimate import ComputeEstimate, ComputeStage, first_images
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, Progress, no_log
from wherefrom.runtime.distributed import Runner

Need = Literal["model", "gradients", "features", "prompt", "trajectory"]
ONCE = "once for this model"  # suffix of the name of a stage that is computed once per model and training set


class Attributor(ABC):
    """Attribution method: `fit` once per model and training set, then `score` queries.

    Attributes:
        requires: Inputs that the method needs: a model, its gradients, image or caption features, the query's prompt,
            its sampling trajectory. Callers read it instead of testing for the class.
        takes_regions: Whether a region of a query can be attributed.
        scores_loss_changes: Whether scores are changes of the training images' losses, which have a sign.
        progress: Called with (done, total) during long computations.
        fit_s: Seconds that each part of the last `fit` took, by name; parts loaded from the store count as loaded.
    """

    requires: frozenset[Need] = frozenset()
    takes_regions: bool = False
    scores_loss_changes: bool = False
    progress: Progress | None = None
    fit_s: Mapping[str, float] = {}

    def estimate(self, data: TrainingData, queries: int) -> ComputeEstimate:
        """Cost in forward passes and in bytes on disk and in memory; zero by default.

        Args:
            data: The training data, or blank data of the same shapes.
            queries: How many queries will be scored.
        """
        return ComputeEstimate()

    def stages(
        self, data: TrainingData, *, queries: int, name: str, candidates: int | None = None
    ) -> list[ComputeStage]:
        """Cost of the method by stage: what is computed once, and what for each query.

        Methods that use encoders add a stage for each; methods that wrap others concatenate the stages of those.

        Args:
            data: The training data, or blank data of the same shapes.
            queries: How many queries will be scored.
            name: Prefix of the stages' names.
            candidates: Number of training images that each query is scored against; None is all.
        """
        once = self.estimate(data, queries)
        each = self.estimate(first_images(data, candidates), queries)
        return [
            ComputeStage(f"{name}: {ONCE}", once.once, once.disk, once.memory),
            ComputeStage(f"{name}: queries", each.per_query, queries=queries),
        ]

    def share_curvature(  # noqa: B027  most methods have no curvature
        self, model: DiffusionModel, data: TrainingData, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Fits the curvature on this model, for use with all models later given to `fit`; no-op for methods without."""

    @abstractmethod
    def fit(
        self, data: TrainingData, model: DiffusionModel | None, store: Store, runner: Runner, log: Log = no_log
    ) -> None:
        """Computes what the method needs once per training set and model, cached in the store.

        Args:
            data: Training images, and held-out images whose scores are the null distribution.
            model: The model, for methods that require one.
            store: Where results are kept.
            runner: Rank and world size of this process.
            log: Receives lines about what is being computed.

        Raises:
            ValueError: Something that the method requires is missing.
        """

    @abstractmethod
    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        """Scores all training images, or only the candidates, yielding the scores of one query at a time.

        Raises:
            ValueError: `fit` has not run, or a candidate is not a training image.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The settings that decide the scores."""

    def removed(self, data: TrainingData, store: Store) -> frozenset[str]:
        """Ids of training images that were removed from the method's index and rank last; none by default."""
        return frozenset()

    def check(self, queries: Sequence[Query]) -> None:
        """Raises for queries that the method cannot attribute, before any long computation.

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
        """Positions of the candidates among the ids; all positions where there are no candidates.

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
