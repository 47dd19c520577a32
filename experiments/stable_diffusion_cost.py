"""What attribution would cost for Stable Diffusion 1.5: computed from the methods' own counts of passes, not measured.

    python -m experiments.stable_diffusion_cost --images 5000 --rate 35

Every method says how many forward passes it takes (`Attributor.work`; a backward pass counts as two). This divides
them by `--rate`, forward passes of the U-Net a second at 512 × 512 on one GPU. `python evaluate.py budget attribute …`
measures the rate on your machine with your model instead.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from wherefrom.attributors import TrainingData
from wherefrom.commands.budget import blank_images, blank_latents
from wherefrom.commands.method_files import load_methods
from wherefrom.models.conditioning import prompt_embeddings
from wherefrom.runtime.console import duration

METHODS = Path("configs/attributor")
CHOSEN = ("abu", "abu_plus", "influence_bank", "d_trak")
LATENT, EMBEDDINGS = (4, 64, 64), (77, 768)  # of Stable Diffusion 1.5 at 512 × 512, and of its text encoder


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--images", type=int, default=5000)
    made.add_argument("--rate", type=float, default=35, help="forward passes a second")
    made.add_argument("--queries", type=int, default=1, help="attributed together")
    made.add_argument("--methods", nargs="+", default=list(CHOSEN))
    asked = made.parse_args(arguments)
    images = blank_images(asked.images, (512, 512), 1)
    latents = blank_latents(images, torch.zeros(LATENT), prompt_embeddings(torch.zeros(EMBEDDINGS)))
    data = TrainingData(images, latents)
    kept = 4 * asked.images * (2 * math.prod(LATENT) + math.prod(EMBEDDINGS))
    print(f"latents of both flips and prompt embeddings of {asked.images:,} images in float32: {kept / 2**30:.1f} GiB")
    print("| method | passes once | once | passes a query | a query |")
    print("|---|--:|--:|--:|--:|")
    for name, method in load_methods([METHODS / f"{name}.yaml" for name in asked.methods], {}).items():
        work = method.estimate(data, asked.queries)
        times = [duration(count / asked.rate) for count in (work.once, work.per_query)]
        print(f"| {name} | {work.once:,} | {times[0]} | {work.per_query:,} | {times[1]} |")


if __name__ == "__main__":
    main()
