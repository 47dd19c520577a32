"""Command-line options that experiments and benchmarks share; names of earlier releases are still understood."""

from __future__ import annotations

import argparse
from typing import Any


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_images(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Adds `--images`, once `--pictures`: how many training images."""
    parser.add_argument("--images", "--pictures", dest="images", **{"type": int, **options})


def add_noise_samples(parser: argparse.ArgumentParser, default: int) -> None:
    """Adds `--noise-samples`, once `--draws`: how many noise samples a query's gradient is the mean of."""
    parser.add_argument(
        "--noise-samples", "--draws", dest="noise_samples", type=int, default=default, help="of a query's gradient"
    )


def add_samples_per_image(parser: argparse.ArgumentParser, default: int, text: str | None = None) -> None:
    """Adds `--samples-per-image`, once `--visits`."""
    given = text or "samples of the Fisher information an image and flip"
    parser.add_argument(
        "--samples-per-image", "--visits", dest="samples_per_image", type=int, default=default, help=given
    )


def add_relative_loss_increase(parser: argparse.ArgumentParser, default: float | None, text: str | None = None) -> None:
    """Adds `--relative-loss-increase`, once `--rise`."""
    given = text or "by which share a step raises a query's loss"
    parser.add_argument(
        "--relative-loss-increase", "--rise", dest="relative_loss_increase", type=float, default=default, help=given
    )
