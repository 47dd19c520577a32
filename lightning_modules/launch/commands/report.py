"""Write the page and curves of a counterfactual evaluation once more.

python evaluate.py report --output runs/emoji_1k_judge
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jsonargparse import ArgumentParser

from wherefrom.counterfactual.report import write_counterfactual_report


@dataclass(frozen=True)
class Settings:
    """Settings of `evaluate.py report`.

    Attributes:
        output: The run folder of `evaluate.py counterfactual`.
    """

    output: Path

    @classmethod
    def of(cls, parsed: Any, given: Any) -> Self:
        """The settings from what the command line's parser made."""
        return cls(Path(parsed["output"]))


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--output", type=str, required=True, help="the run folder of `evaluate.py counterfactual`")


def run(settings: Settings) -> None:
    """Writes the page and prints the files."""
    for path in write_counterfactual_report(settings.output):
        print(path)
