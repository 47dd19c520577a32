"""How long does EK-FAC take to fit, beside kronfluence?

    python -m benchmarks.curvature
    python -m benchmarks.curvature --layers kv --images 256 --runs 5

Fits the same layers on the same samples (the same timesteps, noise and captions) in the same batches and threads:
cross-attention keys and values, and all linear and convolution layers. Runs are interleaved: the bare forward and
backward of both passes (tensors in memory, no gradient of any weight, back to the first of the layers only), our fit,
kronfluence's covariances, eigenvectors and eigenvalues; both fits draw their samples and write what they find. Times
are the process's own on the processor, which other programs hardly disturb. Prints the ratio of the medians in total
and above the bare passes, the memory of each side in a process of its own, and how far the eigenvalues are apart.
kronfluence sums in float32, as it does by default.
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
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.factor.eigen import load_lambda_matrices
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.support import random_set
from experiments.support.arguments import add_images, add_samples_per_image, script_parser
from wherefrom.curvature import EKFACMatrix, FisherSettings, fit_ekfac
from wherefrom.curvature.ekfac_passes import CovariancePass
from wherefrom.curvature.kronecker import plan_layers
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import select_weights
from wherefrom.models.pipeline import load_model
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import peak_memory
from wherefrom.runtime.distributed import Runner

CASES = {"kv": "cross-attention K/V", "all": "all linear and convolution layers"}
SIDES = ("ours", "kronfluence")


def kronecker_names(model: DiffusionModel, case: str) -> list[str]:
    """The weights of a case: layers with a Kronecker form only, since kronfluence knows no other."""
    names = list(select_weights(model.denoiser, "cross_attention_kv" if case == "kv" else "all"))
    kinds = {name: model.denoiser.get_submodule(name.rpartition(".")[0]) for name in names}
    return [name for name in names if isinstance(kinds[name], nn.Linear | nn.Conv2d)]


class Samples(Dataset[int]):
    """Numbers of samples, fetched a batch at a time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> Tensor:
        """A batch of them."""
        return torch.tensor(indices)


def as_is(batch: Tensor) -> Tensor:
    """A batch that was collated where it was fetched."""
    return batch


class SampledLoss(Task):  # type: ignore[misc]  # kronfluence ships no types
    """Our keyed samples of the training loss, as kronfluence asks for them.

    Args:
        work: Draws the samples; its model is the one that kronfluence has wrapped.
        modules: Names of the layers.
    """

    def __init__(self, work: CovariancePass, modules: Sequence[str]) -> None:
        self.work, self.modules = work, list(modules)

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The sum of the samples' losses, on their true targets."""
        per_image, visits = self.work.settings.per_image, self.work.settings.samples_per_image
        item = batch % per_image
        return self.work.losses(batch // per_image, item // visits, item % visits).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The same."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """The layers."""
        return self.modules


class Case:
    """One set of layers, ready to be fitted by either side.

    Args:
        model: The model.
        data: Its training images.
        case: A key of `CASES`.
        settings: How the samples are drawn.
        batch_size: Samples at a time.
    """

    def __init__(
        self, model: DiffusionModel, data: EncodedImages, case: str, settings: FisherSettings, batch_size: int
    ) -> None:
        self.model, self.data, self.settings, self.batch_size = model, data, settings, batch_size
        self.names = kronecker_names(model, case)
        self.plan = plan_layers(model, data, self.names)
        self.samples = len(data) * settings.per_image
        modules = [layer.module for layer in self.plan.layers]
        wrapped = DiffusionModel(copy.deepcopy(model.denoiser), model.noise_schedule)
        self.task = SampledLoss(CovariancePass(wrapped, data, self.plan, settings, batch_size), modules)
        self.wrapped = prepare_model(wrapped.denoiser, self.task)

    def bare(self) -> Callable[[], None]:
        """Forward and backward of the two passes, to the outputs of the layers."""
        modules = [self.model.denoiser.get_submodule(layer.module) for layer in self.plan.layers]
        every = torch.arange(len(self.data))
        latents, given = self.data.latents_at(every, 0), self.data.conditioning_at(every, 0)
        rows = torch.arange(self.batch_size) % len(latents)
        steps = torch.arange(self.batch_size) * self.model.noise_schedule.steps // self.batch_size
        noise = torch.randn_like(latents[rows])
        batches = [min(self.batch_size, self.samples - start) for start in range(0, self.samples, self.batch_size)]
        outputs: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs.append(output if output.requires_grad else output.requires_grad_())

        def run() -> None:
            handles = [module.register_forward_hook(keep) for module in modules]
            for size in 2 * batches:
                outputs.clear()
                losses = self.model.losses(latents[rows[:size]], given.at(rows[:size]), steps[:size], noise[:size])
                torch.autograd.grad(losses.sum(), outputs)
            for handle in handles:
                handle.remove()

        return run

    def ours(self) -> EKFACMatrix:
        """Our fit."""
        with tempfile.TemporaryDirectory() as folder:
            return fit_ekfac(
                self.model,
                data=self.data,
                names=self.names,
                store=Store(Path(folder)),
                runner=Runner(torch.device("cpu")),
                settings=self.settings,
                batch_size=self.batch_size,
            )

    def kronfluence(self, folder: Path | None = None, dtype: torch.dtype = torch.float32) -> Path:
        """The other fit: the folder of kronfluence's factors, gone again unless a place for it is given."""
        if folder is None:
            with tempfile.TemporaryDirectory() as temporary:
                return self.kronfluence(Path(temporary), dtype)
        analyzer = Analyzer(
            "fit", self.wrapped, self.task, cpu=True, output_dir=str(folder), disable_tqdm=True, log_level=logging.ERROR
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=as_is))
        arguments = FactorArguments(
            strategy="ekfac",
            use_empirical_fisher=True,
            covariance_max_examples=None,
            lambda_max_examples=None,
            activation_covariance_dtype=dtype,
            gradient_covariance_dtype=dtype,
            per_sample_gradient_dtype=dtype,
            lambda_dtype=dtype,
        )
        analyzer.fit_all_factors("ekfac", Samples(self.samples), self.batch_size, factor_args=arguments)
        return Path(analyzer.factors_output_dir("ekfac"))

    def apart(self) -> float:
        """Largest difference of a layer's sorted eigenvalues, as a share of its largest one."""
        shares = []
        with tempfile.TemporaryDirectory() as folder:
            theirs = load_lambda_matrices(self.kronfluence(Path(folder)))
        for name, factors in self.ours().layers.items():
            other = theirs["lambda_matrix"][name] / theirs["num_lambda_processed"][name]
            left, right = factors.eigenvalues.flatten().sort().values, other.flatten().sort().values
            shares.append(float((left - right).abs().max() / right.abs().max()))
        return max(shares)


def memory_of(side: str, options: argparse.Namespace, case: str) -> int:
    """Bytes that a fit needs beside what its process held before, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.curvature", "--side", side, "--layers", case]
    for name in ("model", "images", "samples_per_image", "batch_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: int = json.loads(done.stdout.splitlines()[-1])["bytes"]
    return result


def measure(case: Case, runs: int) -> None:
    """Prints the times of interleaved runs and the ratios of their medians."""
    bare = case.bare()
    bare()
    seconds: dict[str, list[float]] = {"bare": [], "ours": [], "kronfluence": []}
    for _ in range(runs):
        started = time.process_time()
        bare()
        seconds["bare"].append(time.process_time() - started)
        started = time.process_time()
        case.ours()
        seconds["ours"].append(time.process_time() - started)
        started = time.process_time()
        case.kronfluence()
        seconds["kronfluence"].append(time.process_time() - started)
        print("  " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items()), flush=True)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    above = {name: middle[name] - middle["bare"] for name in SIDES}
    print(
        f"  kronfluence takes {middle['kronfluence'] / middle['ours']:.2f} times as long in total, "
        f"{above['kronfluence'] / above['ours']:.2f} times as long above the bare passes "
        f"(medians of {runs}: {middle['bare']:.2f} s bare, {middle['ours']:.2f} s ours, "
        f"{middle['kronfluence']:.2f} s kronfluence)"
    )
    print(f"  eigenvalues apart by at most {case.apart():.1e} of a layer's largest")


def main() -> None:
    """Prints the ratios."""
    parser = script_parser(__doc__)
    parser.add_argument("--model", default="weights/emoji")
    parser.add_argument("--layers", nargs="+", choices=list(CASES), default=list(CASES))
    add_images(parser, default=128)
    add_samples_per_image(parser, 1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="only fit, and print the memory that it took")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", r"`torch\.cuda\.amp\.GradScaler\(args\.\.\.\)` is deprecated", FutureWarning)
    # First, while this process is small: on Linux a process inherits the peak of the one that starts it.
    memory = (
        {} if options.side else {name: [memory_of(side, options, name) for side in SIDES] for name in options.layers}
    )
    model = load_model(options.model)
    data = random_set(model, options.images)
    settings = FisherSettings(options.samples_per_image)
    for name in options.layers:
        case = Case(model, data, name, settings, options.batch_size)
        if options.side is not None:
            before = psutil.Process().memory_info().rss
            getattr(case, options.side)()
            print(json.dumps({"bytes": peak_memory() - before}))
            continue
        print(
            f"{CASES[name]}: {len(case.plan.layers)} layers, {case.samples} samples in batches of "
            f"{options.batch_size}, {torch.get_num_threads()} threads"
        )
        measure(case, options.runs)
        used = [f"{side} {size / 2**20:,.0f} MiB" for side, size in zip(SIDES, memory[name], strict=True)]
        print(f"  memory of the fit: {', '.join(used)}", flush=True)


if __name__ == "__main__":
    main()
