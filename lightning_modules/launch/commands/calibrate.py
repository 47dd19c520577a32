"""Calibrate a ranker: how likely an image of a given similarity is among a teacher's first.

python evaluate.py calibrate --ranker runs/emoji_ranker/ranker --teacher runs/emoji_1k_teacher_test --output runs/sure
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jsonargparse import ArgumentParser

from wherefrom.distillation.calibration import CalibrationSettings, calibrate_ranker


@dataclass(frozen=True)
class Settings:
    """Settings of `evaluate.py calibrate`.

    Attributes:
        ranker: The ranker's folder.
        teacher: A teacher set of held-out queries.
        output: Folder for the calibration.
        settings: Of the calibration.
    """

    ranker: Path
    teacher: Path
    output: Path
    settings: CalibrationSettings

    @classmethod
    def of(cls, parsed: Any, given: Any) -> Self:
        """The settings from what the command line's parser made."""
        return cls(parsed["ranker"], parsed["teacher"], parsed["output"], parsed["settings"])


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--ranker", type=Path, required=True, help="the ranker's folder")
    parser.add_argument("--teacher", type=Path, required=True, help="a teacher set of held-out queries")
    parser.add_argument("--output", type=Path, required=True, help="folder for the calibration")
    parser.add_class_arguments(CalibrationSettings, "settings")


def run(settings: Settings) -> None:
    """Calibrates and says on how much."""
    result = calibrate_ranker(settings.output, settings.ranker, settings.teacher, settings.settings)
    print(f"calibrated on {len(result.queries)} queries, {len(result.low)} bins of similarity: {settings.output}")
