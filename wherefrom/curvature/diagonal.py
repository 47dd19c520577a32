"""The diagonal of the empirical Fisher information (AbU, section 3.2).

Mean squared per-sample gradients over the training set, in which an image counts as often as training sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wherefrom.curvature.base import CurvatureMatrix, finite_rows
from wherefrom.curvature.fisher_samples import FisherSettings, SampledPass, finite, zeros_like_parameters
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.per_sample import PerSampleGradients
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime.artifacts import Store, read_manifest
from wherefrom.runtime.checked_files import read_tensors
from wherefrom.runtime.console import Progress
from wherefrom.runtime.dataset_pass import RESULT, run_pass
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.stable_names import settings_identity

_COUNT = "samples"


class DiagonalMatrix(CurvatureMatrix):
    """F⁻¹ g = g / (f + δ), with δ = damping · mean(f) of each tensor.

    Args:
        fisher: Mean squared per-sample gradient by parameter name.
        damping: Relative damping; AbU's own is 0, FastGDA's 0.1.

    Raises:
        ValueError: The damping is negative, or the Fisher information is not finite or negative.
    """

    def __init__(self, fisher: Mapping[str, Tensor], damping: float = 0.1) -> None:
        if damping < 0:
            raise ValueError(f"damping must not be negative; given {damping}.")
        for name, values in fisher.items():
            if not torch.isfinite(values).all() or (values < 0).any():
                raise ValueError(
                    f"The Fisher information of {name!r} holds negative or non-finite values; make it again."
                )
        self.fisher, self.damping = dict(fisher), damping

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns g / (f + δ) for each tensor.

        Raises:
            ValueError: A parameter has no Fisher information of its shape, or a step is not finite.
        """
        steps = {}
        for name, gradient in gradients.items():
            steps[name] = gradient / self._damped(name, gradient, gradient.shape)
            if not torch.isfinite(steps[name]).all():
                raise ValueError(
                    f"The Newton step of {name!r} is not finite: some Fisher values are 0. Set damping above 0."
                )
        return steps

    def whiten(self, gradients: Mapping[str, Float[Tensor, "b n"]]) -> dict[str, Float[Tensor, "b m"]]:
        """Returns g / √(f + δ) of each row."""
        result = {}
        for name, rows in gradients.items():
            values = self.fisher.get(name)
            shape = rows.shape[1:] if values is None or values.numel() != rows.shape[1] else values.shape
            result[name] = finite_rows(name, rows / self._damped(name, rows, shape).flatten().sqrt())
        return result

    def _damped(self, name: str, like: Tensor, shape: torch.Size) -> Tensor:
        """The damped values of a tensor of this shape."""
        values = self.fisher.get(name)
        if values is None or values.shape != shape:
            result = "none" if values is None else f"shape {tuple(values.shape)}"
            raise ValueError(
                f"The Fisher information holds {result} for weight {name!r} of shape {tuple(shape)}: it was made for "
                "other weights. Fit it with the same `weights` and model."
            )
        values = values.to(like.device, like.dtype)
        return values + self.damping * values.mean()

    def lacks(self, names: Sequence[str]) -> list[str]:
        """Parameters without Fisher information."""
        return [name for name in names if name not in self.fisher]


class FisherPass(SampledPass):
    """Sums squared per-sample gradients (a `TrainingPass`).

    Args:
        model: The pretrained model.
        data: Its training images.
        names: Parameters.
        settings: How to sample.
        batch_size: Samples at a time.

    Raises:
        ValueError: A layer has no per-sample gradient, or a gradient is not finite.
    """

    def __init__(
        self,
        model: DiffusionModel,
        data: EncodedImages,
        names: Sequence[str],
        settings: FisherSettings,
        batch_size: int,
    ) -> None:
        super().__init__(model, data, names, settings, batch_size)
        self.sums = zeros_like_parameters(model, names)

    def add(self, tap: PerSampleGradients, losses: Float[Tensor, " b"], roots: Float[Tensor, " b"] | None) -> None:
        """Adds the squared gradients of a batch."""
        for name, gradients in tap.per_sample(losses):
            self.sums[name] += finite(name, gradients.square().sum(dim=0))

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Adds the sums of another process or of an earlier run."""
        for name, total in self.sums.items():
            total += state[name].to(total.device)
        self.samples += int(state[_COUNT])

    def state_dict(self) -> dict[str, Tensor]:
        """The sums and the number of samples."""
        return {**self.sums, _COUNT: torch.tensor(self.samples)}

    def mean(self) -> dict[str, Tensor]:
        """The diagonal Fisher information."""
        return {name: (total / self.samples).to(self.model.dtype) for name, total in self.sums.items()}


def fit_diagonal(
    model: DiffusionModel,
    *,
    data: EncodedImages,
    names: Sequence[str],
    store: Store,
    runner: Runner,
    settings: FisherSettings = FisherSettings(),
    damping: float = 0.1,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> DiagonalMatrix:
    """The diagonal Fisher information of these weights over the training set, kept in the store.

    Args:
        model: The pretrained model.
        data: Its training images.
        names: Parameters.
        store: Where it is kept.
        runner: Rank and world size of this process.
        settings: How to sample.
        damping: Relative damping.
        batch_size: Samples at a time; does not change the result.
        progress: Called with (done, total) chunks.

    Raises:
        ValueError: A layer has no per-sample gradient, or a gradient is not finite.
        StorageError: The store could not be written.
    """
    identity: dict[str, Any] = {
        "model": model.fingerprint(),
        "data": data.weighted_fingerprint,
        "weights": sorted(names),
        "dtype": str(model.dtype),
        **settings_identity(settings),
    }
    work = run_pass(
        lambda: FisherPass(model, data, names, settings, batch_size),
        count=len(data),
        store=store,
        kind="fisher",
        identity=identity,
        runner=runner,
        progress=progress,
    )
    return DiagonalMatrix(work.mean(), damping)


def load_diagonal(
    folder: Path, model: DiffusionModel, curvature_from: str | None = None, damping: float = 0.1
) -> DiagonalMatrix:
    """A Fisher diagonal that `fit_diagonal` left in a folder, refused if it belongs to another model.

    Args:
        folder: The artifact.
        model: The model that will be unlearned.
        curvature_from: Fingerprint of the model that the Fisher information was made on, where that is on purpose
            another one (the base of a customized model).
        damping: Relative damping.

    Raises:
        ValueError: It was made on a model that is neither this one nor the declared parent, or it lacks a weight.
        FileNotFoundError: The folder is not a whole artifact.
    """
    made_on, wanted = str(read_manifest(folder)["identity"]["model"]), model.fingerprint()
    if made_on not in (wanted, curvature_from):
        declared = "nothing" if curvature_from is None else repr(curvature_from)
        raise ValueError(
            f"{folder} holds the Fisher information of model {made_on}, but the model to unlearn is {wanted} and "
            "curvature_from declares "
            f"{declared}. Fit it on this model, or, if that one is its base, set curvature_from: {made_on}."
        )
    state = read_tensors(folder / RESULT, [_COUNT])
    samples = int(state.pop(_COUNT))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.denoiser.named_parameters()}
    for name, total in state.items():
        if shapes.get(name) != tuple(total.shape):
            raise ValueError(
                f"{folder}: weight {name!r} has shape {tuple(total.shape)}, in the model to unlearn "
                f"{shapes.get(name)}: "
                "it was made for a model of another kind."
            )
    return DiagonalMatrix({name: (total / samples).to(model.dtype) for name, total in state.items()}, damping)
