"""How much of scoring is the bare U-Net forward?

    python -m benchmarks.scoring

Runs the loss pass and the same module's bare forward in turn (same module, dtype, threads and batch, tensors in
memory, no gradients) and prints the ratio of their throughputs, pair by pair, and what the rest is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.support import latent_shape, random_set
from experiments.support.arguments import add_images, script_parser
from wherefrom.gradients.loss_grid import LossGrid, LossPass
from wherefrom.models.conditioning import PROMPT, prompt_embeddings
from wherefrom.models.pipeline import load_model
from wherefrom.runtime import keyed_random


def timed(work: Callable[[], None]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.no_grad()
def main() -> None:
    """Prints the ratios."""
    arguments = script_parser(__doc__)
    arguments.add_argument("--model", default="weights/emoji")
    add_images(arguments, default=128)
    arguments.add_argument("--timesteps", type=int, default=8)
    arguments.add_argument("--batch-size", type=int, default=256)
    arguments.add_argument("--runs", type=int, default=7)
    options = arguments.parse_args()
    model = load_model(options.model)
    data, shape = random_set(model, options.images), latent_shape(model)
    grid = LossGrid(timesteps=options.timesteps)
    count = options.images * 2 * options.timesteps
    batch = options.batch_size
    assert model.encoder is not None
    null = model.encoder.text.encode([""])[PROMPT]
    noisy, conditioning = torch.randn(batch, *shape), prompt_embeddings(torch.randn(batch, *null.shape[1:]))
    timesteps = torch.arange(batch) * model.noise_schedule.steps // batch

    def bare() -> None:
        for start in range(0, count, batch):
            size = min(batch, count - start)
            model.predict(noisy[:size], timesteps[:size], conditioning.at(slice(size)))

    def scoring() -> None:
        LossPass(model, data, grid, batch).step(range(options.images))

    def noise() -> None:
        for _ in range(0, count, batch):
            keyed_random.normal(keyed_random.combine(0, torch.arange(batch)), shape)

    def gather() -> None:
        for start in range(0, count, batch):
            rows = torch.arange(start, min(start + batch, count)) % options.images
            data.latents_at(rows, 0), data.conditioning_at(rows, 0)

    bare()
    scoring()
    ratios: list[float] = []
    parts: dict[str, list[float]] = {"noise": [], "gather": []}
    for _ in range(options.runs):
        forward = timed(bare)
        ratios.append(forward / timed(scoring))
        parts["noise"].append(timed(noise) / forward)
        parts["gather"].append(timed(gather) / forward)
        print(f"bare forward {count / forward:,.0f}/s, scoring at {ratios[-1]:.1%} of it")
    print(
        f"median over {options.runs} runs: scoring reaches {statistics.median(ratios):.1%} of the bare forward "
        f"({torch.get_num_threads()} threads)"
    )
    print(", ".join(f"{name} costs {statistics.median(values):.1%} of a forward" for name, values in parts.items()))


if __name__ == "__main__":
    main()
