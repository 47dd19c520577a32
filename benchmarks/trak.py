"""How long does it take to project the gradients of training images, beside traker?

    python -m benchmarks.trak
    python -m benchmarks.trak --samples 512 --dimension 4096 --runs 5

Featurises the same samples, one keyed (timestep, noise) of each image, over all weights of the same model with the
same number of threads and projected dimension: ours is `project_images`, theirs `TRAKer.featurize` of batches that
are ready in memory; both write what they find. Runs are interleaved and start with either side in turn. Times are the
process's own on the processor, which other programs hardly disturb; the matrix that traker makes when it is set up is
not counted. Prints the ratio of the medians, the memory of each side in a process of its own, and how far the
per-sample gradients of both are apart.

traker takes per-sample gradients by vmap, which attention by the fused kernel does not stand: its model computes
attention step by step. On a processor traker's default is a matrix of normal numbers, made again for every batch; a
larger batch is in its favour, so it has its own, the largest of those tried that pays.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput

from benchmarks.support import random_set
from experiments.support.arguments import script_parser
from wherefrom.attributors.trak.projected_features import ImageFeatures, project_images
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossSamples
from wherefrom.gradients.projection import Projection
from wherefrom.models.conditioning import PROMPT
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import select_weights
from wherefrom.models.pipeline import load_model
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import peak_memory
from wherefrom.runtime.distributed import Runner

SIDES = ("ours", "traker")
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class DiffusionLoss(AbstractModelOutput):  # type: ignore[misc]  # traker ships no types
    """The training loss of one noisy latent, as traker asks for it: (x_t, timestep, token states, target)."""

    def __init__(self) -> None:
        pass

    @staticmethod
    def get_output(
        model: nn.Module,
        weights: dict[str, Tensor],
        buffers: dict[str, Tensor],
        noisy: Tensor,
        timestep: Tensor,
        states: Tensor,
        target: Tensor,
    ) -> Tensor:
        """The loss itself."""
        given = (noisy[None], timestep[None])
        asked = {"encoder_hidden_states": states[None], "return_dict": False}
        output = torch.func.functional_call(model, (weights, buffers), given, asked)[0]
        loss: Tensor = (target[None] - output).square().mean()
        return loss

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch
    ) -> Tensor:
        """One: the output is the loss."""
        return torch.ones(len(batch[0]), 1)


class Case:
    """Samples that either side may featurise.

    Args:
        model: The model.
        data: The images.
        projection: Ours; traker's has its dimension.
        batch_size: Samples of ours at a time.
        their_batch_size: Samples of traker's at a time.
    """

    def __init__(
        self, model: DiffusionModel, data: EncodedImages, projection: Projection, batch_size: int, their_batch_size: int
    ) -> None:
        self.model, self.data, self.batch_size = model, data, batch_size
        self.names = list(select_weights(model.denoiser, "all"))
        self.noise_samples, self.projection = LossSamples(noise_samples=1, flips=False), projection
        self.batches = [self.batch(part) for part in torch.arange(len(data)).split(their_batch_size)]

    def batch(self, image: Tensor) -> Batch:
        """The samples of these images, as traker's task asks for them."""
        losses = self.noise_samples.of(self.model, self.data, self.batch_size)
        caption, timestep, keys = losses.noise_samples(image, torch.zeros_like(image))
        latents = self.data.latents_at(image, 0)
        noise = keyed_random.normal(keys, latents.shape[1:], self.model.dtype)
        process = self.model.noise_schedule
        noisy, target = process.noisy(latents, timestep, noise), process.target(latents, timestep, noise)
        return noisy, timestep, self.data.conditioning_at(image, caption)[PROMPT], target

    @contextmanager
    def ours(self) -> Iterator[Callable[[], None]]:
        """Our featurising, once it is set up."""
        with tempfile.TemporaryDirectory() as folder:
            store, runner = Store(Path(folder)), Runner(torch.device("cpu"))
            settings: dict[str, Any] = {"grid": self.noise_samples, "names": self.names, "projection": self.projection}
            yield lambda: (
                project_images(
                    self.model, data=self.data, store=store, runner=runner, batch_size=self.batch_size, **settings
                ),
                None,
            )[1]

    @contextmanager
    def traker(self) -> Iterator[Callable[[], None]]:
        """Theirs."""
        with tempfile.TemporaryDirectory() as folder:
            model = self.for_vmap()
            made = TRAKer(
                model,
                DiffusionLoss(),
                len(self.data),
                save_dir=folder,
                device="cpu",
                proj_dim=self.projection.dimension,
                use_half_precision=False,
                logging_level=logging.ERROR,
            )
            made.load_checkpoint(model.state_dict(), model_id=0)

            def run() -> None:
                for batch in self.batches:
                    made.featurize(batch, num_samples=len(batch[0]))

            yield run

    def for_vmap(self) -> nn.Module:
        """A copy of the U-Net that computes attention step by step and whose weights ask for gradients."""
        model = copy.deepcopy(self.model.denoiser).requires_grad_(True)
        network: Any = model
        network.set_attn_processor(AttnProcessor())
        return model

    def seconds(self, side: str) -> float:
        """Seconds on the processor that a side takes."""
        with getattr(self, side)() as run:
            started = time.process_time()
            run()
            return time.process_time() - started

    def apart(self, count: int = 8) -> float:
        """Largest difference of a per-sample gradient, as a share of its parameter's largest gradient."""
        model, image = self.for_vmap(), torch.arange(min(count, len(self.data)))
        weights: dict[str, Tensor] = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        gradient = torch.func.grad(DiffusionLoss.get_output, argnums=1)
        theirs = torch.func.vmap(gradient, in_dims=(None, None, None, 0, 0, 0, 0))(
            model, weights, buffers, *self.batch(image)
        )
        losses = self.noise_samples.of(self.model, self.data, self.batch_size)
        ours = ImageFeatures(losses, self.names, self.projection.project).gradients(range(len(image)))
        shares = [
            float((ours[name] - theirs[name].detach().flatten(1)).abs().max() / theirs[name].detach().abs().max())
            for name in self.names
        ]
        return max(shares)


def memory_of(side: str, options: argparse.Namespace) -> int:
    """Bytes that featurising needs beside what its process held before, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.trak", "--side", side]
    for name in ("model", "samples", "dimension", "batch_size", "their_batch_size", "kind"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: int = json.loads(done.stdout.splitlines()[-1])["bytes"]
    return result


def measure(case: Case, runs: int) -> dict[str, float]:
    """Prints the times of interleaved runs; returns their medians."""
    result: dict[str, list[float]] = {side: [] for side in SIDES}
    for run in range(runs):
        for side in SIDES if run % 2 == 0 else SIDES[::-1]:
            result[side].append(case.seconds(side))
        print("  " + ", ".join(f"{side} {values[-1]:.1f} s" for side, values in result.items()), flush=True)
    return {side: statistics.median(values) for side, values in result.items()}


def main() -> None:
    """Prints the ratio."""
    parser = script_parser(__doc__)
    parser.add_argument("--model", default="weights/emoji")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--their-batch-size", type=int, default=64)
    parser.add_argument("--kind", choices=["rademacher", "gaussian", "sparse"], default="rademacher", help="ours")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="only featurise, and print the memory that it took")
    options = parser.parse_args()
    # First, while this process is small: on Linux a process inherits the peak of the one that starts it.
    memory = {} if options.side else {side: memory_of(side, options) for side in SIDES}
    model = load_model(options.model)
    data = random_set(model, options.samples)
    projection = Projection(options.dimension, kind=options.kind)
    case = Case(model, data, projection, options.batch_size, options.their_batch_size)
    if options.side is not None:
        before = psutil.Process().memory_info().rss
        case.seconds(options.side)
        print(json.dumps({"bytes": peak_memory() - before}))
        return
    weights = sum(parameter.numel() for parameter in model.denoiser.parameters())
    print(
        f"{options.samples} samples, {weights:,} weights to {options.dimension} numbers ({options.kind}), batches of "
        f"{options.batch_size} (ours) and {options.their_batch_size} (traker), {torch.get_num_threads()} threads"
    )
    middle = measure(case, options.runs)
    print(
        f"traker takes {middle['traker'] / middle['ours']:.2f} times as long (medians of {options.runs}: "
        f"{middle['ours']:.1f} s ours, {middle['traker']:.1f} s traker)"
    )
    print("memory: " + ", ".join(f"{side} {size / 2**20:,.0f} MiB" for side, size in memory.items()))
    print(f"per-sample gradients apart by at most {case.apart():.1e} of a parameter's largest")


if __name__ == "__main__":
    main()
