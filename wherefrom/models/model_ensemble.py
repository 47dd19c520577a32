"""Further models trained on the same images, whose scores are averaged with those of the model that is attributed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset, select_weights
from wherefrom.models.pipeline import load_model

_CHANNELS = ("in_channels", "out_channels")


def load_ensemble(model: DiffusionModel, sources: Sequence[str], weights: Subset) -> list[DiffusionModel]:
    """The further models of an ensemble, on the first one's device and in its type of number.

    Args:
        model: The model that is attributed.
        sources: Pipelines of the others.
        weights: Which weights count.

    Raises:
        ValueError: One differs in architecture, noise schedule, autoencoder or text encoder; the message names it.
        OSError: There is no pipeline at a path.
    """
    others = []
    for source in sources:
        other = load_model(source)
        check_member(source, model, other, weights)
        other.to(model.device).denoiser.to(model.dtype)
        others.append(other)
    return others


def check_member(source: str, model: DiffusionModel, other: DiffusionModel, weights: Subset) -> None:
    """Refuses a model whose scores cannot be averaged with the first one's.

    Raises:
        ValueError: It differs in architecture, noise schedule, autoencoder or text encoder.
    """
    for what, mine, theirs, remedy in (
        (*_encoders(model, other), "train its members on one data set with the same autoencoder and text encoder"),
        (*_schedules(model, other), "train its members with the same noise scheduler"),
        (*_architectures(model, other, weights), "train its members with the same U-Net configuration"),
    ):
        if mine != theirs:
            raise ValueError(
                f"Ensemble member {source} differs in its {what}: {theirs!r}, where the model that is attributed has "
                f"{mine!r}. Leave it out, or {remedy}."
            )


def _encoders(model: DiffusionModel, other: DiffusionModel) -> tuple[str, Any, Any]:
    mine, theirs = ({} if each.encoder is None else each.encoder.identity() for each in (model, other))
    for each in (mine, theirs):
        each.pop("size", None)  # of the images that were encoded last
    name = _first_difference(mine, theirs)
    words = {"vae": "autoencoder", "scale": "autoencoder's scaling", "text_encoder": "text encoder"}
    return words.get(name, name), mine.get(name), theirs.get(name)


def _schedules(model: DiffusionModel, other: DiffusionModel) -> tuple[str, Any, Any]:
    mine, theirs = (
        {
            "prediction type": each.noise_schedule.prediction,
            "number of timesteps": each.noise_schedule.steps,
            **{
                f"noise schedule (√ᾱ at timestep {t})": value
                for t, value in enumerate(each.noise_schedule.signal.tolist())
            },
        }
        for each in (model, other)
    )
    name = _first_difference(mine, theirs)
    return name, mine.get(name), theirs.get(name)


def _architectures(model: DiffusionModel, other: DiffusionModel, weights: Subset) -> tuple[str, Any, Any]:
    mine, theirs = (
        {
            **{name: getattr(getattr(each.denoiser, "config", None), name, None) for name in _CHANNELS},
            **{f"shape of {name}": tuple(w.shape) for name, w in select_weights(each.denoiser, weights).items()},
        }
        for each in (model, other)
    )
    name = _first_difference(mine, theirs)
    return name, mine.get(name), theirs.get(name)


def _first_difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The first name whose values differ, or "" (under which neither has a value)."""
    return next((name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)), "")
