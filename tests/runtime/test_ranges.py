"""Settings out of their range are refused where they are made, by name, in every class that has one."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import wherefrom.attributors as methods
from callbacks import LossChange, SampleGrid
from wherefrom.attributors.base import Attributor
from wherefrom.attributors.influence.banked import InfluenceBank
from wherefrom.attributors.similarity import PixelSimilarity, Random
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings
from wherefrom.commands.tracking import Tracking
from wherefrom.curvature import EKFAC, DiagonalFisher, FisherSettings
from wherefrom.gradients.loss_grid import LossGrid, LossSamples
from wherefrom.queries.sources import QuerySource
from wherefrom.reports.query_section import ReportOptions
from wherefrom.runtime.ranges import RANGES, check_ranges

OUT: dict[str, list[Any]] = {
    "be at least 1": [0, -3, 1.5, True, float("nan"), "2"],
    "be at least 0 and below 2^63": [-1, 2**63, 0.5],
    "lie between 0 and 1": [-0.1, 1.1, float("nan")],
    "be at least 0 and less than 1": [-0.1, 1.0],
    "be positive": [0, -1.0, float("inf"), float("nan")],
    "not be negative": [-1e-9, float("inf"), float("nan")],
}
KINDS: list[Any] = [
    *(getattr(methods, name) for name in ("AttributionByUnlearning", "InfluenceFunction", "TRAK", "JourneyTRAK")),
    *(InfluenceBank, PixelSimilarity, Random, UnlearningSettings, FisherSettings, DiagonalFisher, EKFAC),
    *(LossGrid, LossSamples, QuerySource, ReportOptions, Tracking, SampleGrid, LossChange),
]
GIVEN: dict[Any, dict[str, Any]] = {SampleGrid: {"prompts": ["a"], "folder": "runs"}}
# `steps` and `timesteps` of JourneyTRAK are a number and a list; α replaces the increase; λ is strictly positive.
APART = {("JourneyTRAK", "timesteps"), ("UnlearningSettings", "alpha")}


def cases() -> list[Any]:
    return [
        pytest.param(kind, name, bad, id=f"{kind.__name__}-{name}-{bad}")
        for kind in KINDS
        for name in inspect.signature(kind).parameters
        if name in RANGES and (kind.__name__, name) not in APART
        for bad in OUT[RANGES[name].words]
        if not (isinstance(bad, str) and issubclass(kind, Attributor))
    ]


@pytest.mark.parametrize(("kind", "name", "bad"), cases())
def test_a_setting_out_of_its_range_is_refused(kind: Any, name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match="lambda" if name.endswith("lambda") else f"{name} must "):
        kind(**GIVEN.get(kind, {}), **{name: bad})


@pytest.mark.parametrize("bad", OUT["not be negative"])
def test_alpha_is_refused_too(bad: float) -> None:
    with pytest.raises(ValueError, match=r"alpha must (not be negative|be a finite number); given"):
        UnlearningSettings(relative_loss_increase=None, alpha=bad)


def test_what_is_in_range_passes() -> None:
    check_ranges(batch_size=1, seed=0, flip_share=1, caption_dropout=0.0, damping=0, relative_loss_increase=1e-9)
    check_ranges(batch_size=None, seed=2**63 - 1)
