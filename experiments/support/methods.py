"""Attribution methods by the names of their files, with the few timesteps and noise samples of a quick comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wherefrom.attributors import Attributor
from wherefrom.commands.method_files import load_methods

METHODS = Path("configs/attributor")


def method_file(name: str) -> Path:
    """A method's configuration."""
    return METHODS / f"{name}.yaml"


def load_method(name: str, changed: Mapping[str, Any]) -> Attributor:
    """The attributor of this name, with some settings changed."""
    return load_methods([method_file(name)], changed)[name]


def quick_settings(
    *, timesteps: int, noise_samples: int, samples_per_image: int, relative_loss_increase: float | None = None
) -> dict[str, Any]:
    """What replaces the files' settings; without a relative loss increase the methods keep their own."""
    step = {} if relative_loss_increase is None else {"unlearning.relative_loss_increase": relative_loss_increase}
    return step | {
        "grid.timesteps": timesteps,
        "unlearning.noise_samples": noise_samples,
        "noise_samples": noise_samples,
        "fisher.samples_per_image": samples_per_image,
        "projection.kind": "sparse",  # as good on average, and thirty times as fast
    }
