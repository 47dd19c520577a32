"""Data, settings and comparisons that tests of curvature share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tests.support.tiny import tiny_latents
from wherefrom.curvature import FisherSettings
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset, select_weights

DATA = tiny_latents(4, captions=2)
SETTINGS = FisherSettings(samples_per_image=2, seed=3)


def names_of(model: DiffusionModel, subset: Subset) -> list[str]:
    return list(select_weights(model.denoiser, subset))


def assert_close(result: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float) -> None:
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert float((result[name] - value).abs().max()) <= rtol * float(value.abs().max()), name
