"""Estimators of the curvature: which form it has, how it is fitted or loaded, and what fitting costs.

A method is given one of these (in YAML by `class_path: DiagonalFisher`, `EKFAC` or `Identity`) and asks it for the
fitted `CurvatureMatrix`; no method knows which form it was given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wherefrom.curvature.base import CurvatureMatrix, IdentityMatrix
from wherefrom.curvature.diagonal import DiagonalMatrix, fit_diagonal, load_diagonal
from wherefrom.curvature.ekfac import EKFACMatrix, fit_ekfac
from wherefrom.curvature.ekfac_files import load_ekfac
from wherefrom.curvature.fisher_samples import FisherSettings
from wherefrom.curvature.planning import ekfac_plan
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, Progress, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.ranges import check_ranges
from wherefrom.runtime.stable_names import settings_identity

_FORWARD_AND_BACKWARD = 3  # a backward pass costs two forward passes


@dataclass(frozen=True)
class FitContext:
    """What a curvature is fitted on, and where what is fitted is kept.

    Attributes:
        model: The pretrained model.
        data: Its training images.
        names: The parameters whose gradients will be preconditioned.
        store: Where the fitted matrix is kept.
        runner: Rank and world size of this process.
        progress: Called with (done, total) chunks of each pass.
        log: Receives a line about what will be fitted.
    """

    model: DiffusionModel
    data: EncodedImages
    names: Sequence[str]
    store: Store
    runner: Runner
    progress: Progress | None = None
    log: Log = no_log


class Curvature(ABC):
    """An estimator of the curvature matrix F of some weights over a training set.

    Attributes:
        form: What identities call the form of F.
        folder: Where a matrix made elsewhere is kept, which `matrix` loads; None fits one.
    """

    form: str
    folder: Path | None = None

    @abstractmethod
    def fit(self, on: FitContext) -> CurvatureMatrix:
        """Fits F by passes over the training set, cached in the store.

        Raises:
            ValueError: A layer has no per-sample gradient, or a gradient is not finite.
            StorageError: The store could not be written.
        """

    @abstractmethod
    def load(self, folder: Path, model: DiffusionModel) -> CurvatureMatrix:
        """Loads an F of this form that was fitted elsewhere.

        Raises:
            ValueError: It was fitted on another model, and `curvature_from` does not declare that one.
            FileNotFoundError: The folder does not hold one.
        """

    @abstractmethod
    def passes(self, data: EncodedImages) -> int:
        """Forward passes of the model that `matrix` costs; a backward pass counts as two, loading costs none."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The settings that decide F, under the keys that stored identities of methods hold."""

    def matrix(self, on: FitContext) -> CurvatureMatrix:
        """F, loaded from `folder` where that is given, otherwise fitted.

        Raises:
            ValueError: As `fit` and `load`; or what was loaded lacks one of the parameters.
        """
        if self.folder is None:
            return self.fit(on)
        loaded = self.load(self.folder, on.model)
        loaded.check(on.names, f"The curvature in {self.folder}")
        return loaded


class Identity(Curvature):
    """F = I: gradients are not preconditioned.

    Args:
        recorded: A curvature that is set but not used, as in the SGD ablation of attribution by unlearning: `identity`
            goes on to record its settings. None records the defaults.
    """

    form = "identity"

    def __init__(self, recorded: Curvature | None = None) -> None:
        self.recorded: Curvature = DiagonalFisher() if recorded is None else recorded

    def fit(self, on: FitContext) -> IdentityMatrix:
        """The identity matrix; nothing is computed."""
        return IdentityMatrix()

    def load(self, folder: Path, model: DiffusionModel) -> IdentityMatrix:
        """The identity matrix; nothing is read."""
        return IdentityMatrix()

    def passes(self, data: EncodedImages) -> int:
        """None."""
        return 0

    def identity(self) -> dict[str, Any]:
        """The settings of the curvature that is not used, and that the identity takes its place."""
        return {**self.recorded.identity(), "curvature": self.form}


class _FisherInformation(Curvature):
    """Forms of the empirical Fisher information, averages over sampled per-sample gradients.

    Args:
        fisher: How the training set is sampled.
        damping: δ relative to the mean of each tensor's (or layer's) eigenvalues.
        fisher_path: Folder of a Fisher information made elsewhere, in the same form, instead of fitting one.
        curvature_from: Fingerprint of the model that `fisher_path` was made on, where it is another one.

    Raises:
        ValueError: The damping is negative.
    """

    sampling_passes: int  # over the training set

    def __init__(
        self,
        fisher: FisherSettings = FisherSettings(),
        damping: float = 0.1,
        fisher_path: str | None = None,
        curvature_from: str | None = None,
    ) -> None:
        check_ranges(damping=damping)
        self.fisher, self.damping, self.curvature_from = fisher, damping, curvature_from
        self.folder = None if fisher_path is None else Path(fisher_path)
        self.fisher_path = fisher_path

    def passes(self, data: EncodedImages) -> int:
        """Three for each sample of each pass over the training set."""
        samples = len(data) * self.fisher.per_image
        return 0 if self.folder is not None else _FORWARD_AND_BACKWARD * self.sampling_passes * samples

    def identity(self) -> dict[str, Any]:
        """The settings that decide F."""
        return {
            "curvature": self.form,
            "fisher": settings_identity(self.fisher),
            "damping": self.damping,
            "fisher_path": self.fisher_path,
            "curvature_from": self.curvature_from,
        }


class DiagonalFisher(_FisherInformation):
    """The diagonal of the empirical Fisher information: the curvature of AbU (section 3.2).

    Args:
        fisher: How the training set is sampled.
        damping: δ relative to each tensor's mean; AbU's own is 0, FastGDA's 0.1.
        fisher_path: Folder of a diagonal that `fit` left elsewhere, to be loaded instead of fitting one.
        curvature_from: Fingerprint of the model that `fisher_path` was made on, where it is another one (the base of a
            customized model).

    Raises:
        ValueError: The damping is negative.
    """

    form = "diagonal"
    sampling_passes = 1

    def fit(self, on: FitContext) -> DiagonalMatrix:
        """Mean squared per-sample gradients; see `Curvature.fit`."""
        on.log(f"diagonal Fisher information of {len(on.names)} tensors over {len(on.data):,} training images")
        return fit_diagonal(
            on.model,
            data=on.data,
            names=on.names,
            store=on.store,
            runner=on.runner,
            settings=self.fisher,
            damping=self.damping,
            progress=on.progress,
        )

    def load(self, folder: Path, model: DiffusionModel) -> DiagonalMatrix:
        """A diagonal that `fit` left in a folder; see `Curvature.load`."""
        return load_diagonal(folder, model, self.curvature_from, self.damping)


class EKFAC(_FisherInformation):
    """EK-FAC (George et al. 2018): the curvature of AbU+ (Fast Data Attribution, section 3).

    Args:
        fisher: How the training set is sampled; both passes see the same samples.
        damping: δ relative to each layer's mean eigenvalue.
        layers_per_pass: Fits so many layers at a time, which bounds memory and costs two passes each; null fits all at
            once.
        fisher_path: Folder of factors in kronfluence's layout (see `save_ekfac`), to be loaded instead of fitting.
        curvature_from: Fingerprint of the model that `fisher_path` was made on, where it is another one.

    Raises:
        ValueError: The damping is negative, or `layers_per_pass` is not positive.
    """

    form = "ekfac"
    sampling_passes = 2

    def __init__(
        self,
        fisher: FisherSettings = FisherSettings(),
        damping: float = 0.1,
        layers_per_pass: int | None = None,
        fisher_path: str | None = None,
        curvature_from: str | None = None,
    ) -> None:
        super().__init__(fisher, damping, fisher_path, curvature_from)
        check_ranges(layers_per_pass=layers_per_pass)
        self.layers_per_pass = layers_per_pass

    def fit(self, on: FitContext) -> EKFACMatrix:
        """Covariances and their eigenvectors by one pass, eigenvalues by another; see `Curvature.fit`."""
        on.log(
            ekfac_plan(
                on.model,
                data=on.data,
                names=on.names,
                settings=self.fisher,
                layers_per_pass=self.layers_per_pass,
                store=on.store,
                world_size=on.runner.world_size,
            )
        )
        return fit_ekfac(
            on.model,
            data=on.data,
            names=on.names,
            store=on.store,
            runner=on.runner,
            settings=self.fisher,
            damping=self.damping,
            layers_per_pass=self.layers_per_pass,
            progress=on.progress,
        )

    def load(self, folder: Path, model: DiffusionModel) -> EKFACMatrix:
        """Factors in kronfluence's layout; see `Curvature.load`."""
        return load_ekfac(folder, model, self.curvature_from, self.damping)
