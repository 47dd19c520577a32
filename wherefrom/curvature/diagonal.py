"""The diagonal of the empirical Fisher information (AbU, section 3.2).

Mean squared per-sample gradients over the training set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from safetensors.torch import load_file
from torch import Tensor

from wherefrom import keyed
from wherefrom.curvature.base import Curvature
from wherefrom.data.latents import LatentSet
from wherefrom.diffusion import DiffusionModel
from wherefrom.gradients import PerSampleGradients
from wherefrom.passes import RESULT, Progress, run_pass
from wherefrom.runner import Runner
from wherefrom.storage import Store, read_manifest

_TIME, _CAPTION, _NOISE = 301, 302, 303
_COUNT = "samples"


class Diagonal(Curvature):
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
            values = self.fisher.get(name)
            if values is None or values.shape != gradient.shape:
                found = "none" if values is None else f"shape {tuple(values.shape)}"
                raise ValueError(
                    f"The Fisher information holds {found} for weight {name!r} of shape {tuple(gradient.shape)}: "
                    "it was made for other "
                    "weights. Fit it with the same `weights` and model."
                )
            values = values.to(gradient.device, gradient.dtype)
            steps[name] = gradient / (values + self.damping * values.mean())
            if not torch.isfinite(steps[name]).all():
                raise ValueError(
                    f"The Newton step of {name!r} is not finite: some Fisher values are 0. Set damping above 0."
                )
        return steps


@dataclass(frozen=True)
class FisherSettings:
    """How the Fisher information is sampled.

    Attributes:
        visits: Samples per picture and flip, each with one timestep, one noise draw and one caption.
        seed: Seed of these.
        flips: Also pass the mirror images.
    """

    visits: int = 5
    seed: int = 0
    flips: bool = True

    def __post_init__(self) -> None:
        if self.visits < 1:
            raise ValueError(f"visits must be at least 1; given {self.visits}.")


class FisherPass:
    """Sums squared per-sample gradients (a `TrainingPass`).

    Args:
        model: The pretrained model.
        data: Its training pictures.
        names: Parameters.
        settings: How to sample.
        batch_size: Samples at a time.

    Raises:
        ValueError: A gradient is not finite.
    """

    def __init__(
        self, model: DiffusionModel, data: LatentSet, names: Sequence[str], settings: FisherSettings, batch_size: int
    ) -> None:
        self.model, self.data, self.names, self.settings, self.batch_size = (
            model,
            data,
            list(names),
            settings,
            batch_size,
        )
        shapes = {name: parameter.shape for name, parameter in model.denoiser.named_parameters() if name in set(names)}
        self.sums = {name: torch.zeros(shapes[name], dtype=torch.float64, device=model.device) for name in names}
        self.samples = 0
        self.id_keys = data.id_keys

    def draws(
        self, picture: Int64[Tensor, "b"], flip: Int64[Tensor, "b"], visit: Int64[Tensor, "b"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Timestep, caption and noise key of each sample, keyed by (seed, id, flip, visit)."""
        keys = keyed.combine(self.settings.seed, self.id_keys[picture], flip, visit)
        # One golden-ratio sequence over a picture's visits and flips: its timesteps are spread evenly.
        start = keyed.uniform(keyed.combine(_TIME, self.settings.seed, self.id_keys[picture]))[:, 0]
        time = torch.remainder(start + (2 * visit + flip) * 0.6180339887498949, 1.0)
        caption = keyed.uniform(keyed.combine(_CAPTION, keys))[:, 0] * self.data.states.shape[1]
        return (time * self.model.process.steps).long(), caption.long(), keyed.combine(_NOISE, keys)

    def step(self, positions: range) -> None:
        """Adds the pictures at these positions."""
        flips, visits = (2 if self.settings.flips else 1), self.settings.visits
        per_picture = flips * visits
        for start in range(0, len(positions) * per_picture, self.batch_size):
            flat = torch.arange(start, min(start + self.batch_size, len(positions) * per_picture))
            picture, item = positions.start + flat // per_picture, flat % per_picture
            self._add(picture, item // visits, item % visits)

    def _add(self, picture: Tensor, flip: Tensor, visit: Tensor) -> None:
        model, device = self.model, self.model.device
        timestep, caption, noise_keys = self.draws(picture, flip, visit)
        latents = self.data.latents[picture, flip].to(device, model.dtype)
        states = self.data.states[picture, caption].to(device, model.dtype)
        noise = keyed.normal(noise_keys.to(device), latents.shape[1:], model.dtype)
        with torch.enable_grad(), PerSampleGradients(model.denoiser, self.names) as tap:
            losses = model.losses(latents, states, timestep.to(device), noise)
            for name, gradients in tap.per_sample(losses):
                squared = gradients.square().sum(dim=0)
                if not torch.isfinite(squared).all():
                    raise ValueError(f"The gradient of {name!r} is not finite: check the model's weights and latents.")
                self.sums[name] += squared
        self.samples += len(picture)

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Adds sums made elsewhere."""
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
    data: LatentSet,
    names: Sequence[str],
    store: Store,
    runner: Runner,
    settings: FisherSettings = FisherSettings(),
    damping: float = 0.1,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Diagonal:
    """The diagonal Fisher information of these weights over the training set, kept in the store.

    Args:
        model: The pretrained model.
        data: Its training pictures.
        names: Parameters.
        store: Where it is kept.
        runner: This process's place.
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
        "data": data.fingerprint,
        "weights": sorted(names),
        "dtype": str(model.dtype),
        **asdict(settings),
    }
    work = run_pass(
        lambda: FisherPass(model, data, names, settings, batch_size),
        len(data),
        store,
        "fisher",
        identity,
        runner,
        progress=progress,
    )
    return Diagonal(work.mean(), damping)


def load_diagonal(
    folder: Path, model: DiffusionModel, curvature_from: str | None = None, damping: float = 0.1
) -> Diagonal:
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
    state = load_file(folder / RESULT)
    samples = int(state.pop(_COUNT))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.denoiser.named_parameters()}
    for name, total in state.items():
        if shapes.get(name) != tuple(total.shape):
            raise ValueError(
                f"{folder}: weight {name!r} has shape {tuple(total.shape)}, in the model to unlearn "
                f"{shapes.get(name)}: "
                "it was made for a model of another kind."
            )
    return Diagonal({name: (total / samples).to(model.dtype) for name, total in state.items()}, damping)
