r"""What a query costs by each method: seconds and memory, and where the seconds go.

    python -m benchmarks.attribution
    python -m benchmarks.attribution --methods abu abu_plus influence \
        --timesteps 20 --noise-samples 2000 --samples-per-image 5

Attributes a few images drawn by the committed emoji model to its training images by every method of
`configs/attributor`, at the few timesteps and samples that are given here. Each method runs in a process of its own
with an empty store, so that its memory is its own and nothing is found that another method made. What it makes once for
a model (curvature, losses before unlearning, features) is measured apart from what each query takes. Methods whose
weights are not on this machine are skipped, with the reason: nothing is downloaded. An interrupted run goes on with the
methods that are not measured yet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules import Emoji
from experiments.support.arguments import add_images, add_noise_samples, add_samples_per_image, script_parser
from experiments.support.data import choose_prompts
from experiments.support.markdown import markdown_table
from experiments.support.methods import METHODS, load_method, method_file, quick_settings
from experiments.support.records import recorded_settings
from lightning_modules.launch.runs import training_data
from wherefrom.attributors import Attributor, Query, TrainingData
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import generate
from wherefrom.runtime.artifacts import Store, write_json
from wherefrom.runtime.console import Console, duration, peak_memory
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.keyed_random import hash_text
from wherefrom.runtime.measured_cost import track_peak_memory

ONCE = {"curvature": "curvature", "losses": "losses before unlearning", "features": "features and all else"}
EACH = {
    "gradient": "gradient",
    "step": "step",
    "pass": "pass over the training set",
    "products": "inner products",
    "rest": "rest",
}


@dataclass(frozen=True)
class Cost:
    """What one method took.

    Attributes:
        once: Seconds once for a model, by part (a key of `ONCE`).
        query: Seconds a query, the mean over the queries, by part (a key of `EACH`).
        before: Bytes of resident memory with model and data in place.
        fit: Largest resident memory while it made what it makes once.
        scoring: Largest resident memory while it scored the queries.
        peak: Largest resident memory of the process.
        stored: Bytes that it left in its store.
    """

    once: Mapping[str, float]
    query: Mapping[str, float]
    before: int
    fit: int
    scoring: int
    peak: int
    stored: int

    @property
    def seconds(self) -> float:
        """Seconds a query."""
        return sum(self.query.values())


def parts(facts: Mapping[str, float]) -> dict[str, float]:
    """Where one query's seconds went, as far as its facts tell.

    The step of unlearning holds the search for its size. The pass over the training set measures losses after the
    step or, for influence functions, gradients together with their inner products. Where gradients are projected, that
    belongs to the gradient.
    """
    result = {"gradient": facts["gradient_s"]} if "gradient_s" in facts else {}
    for name, whole in (("step", "unlearning_s"), ("products", "query_s")):
        if whole in facts:
            result[name] = facts[whole] - facts["gradient_s"]
    for whole in ("losses_s", "pass_s"):
        if whole in facts:
            result["pass"] = facts[whole]
    return result


def once_of(fit_s: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Where the seconds of `fit` went: the parts that the method names, and the others."""
    return {**fit_s, "features": seconds - sum(fit_s.values())}


def query_of(split: Sequence[Mapping[str, float]], seconds: float) -> dict[str, float]:
    """Seconds a query by part, of what each query's parts took and all queries together.

    Methods that serve many queries by one pass have no seconds of a single one: all are divided by their number.
    """
    query = {name: float(np.mean([one[name] for one in split])) for name in split[0]}
    return {**query, "rest": seconds / len(split) - sum(query.values())}


def measure(
    method: Attributor, data: TrainingData, model: DiffusionModel, queries: Sequence[Query], store: Store
) -> Cost:
    """Fits the method and scores the queries; the store must be empty."""
    runner, console = Runner.current(), Console()
    method.progress = console.progress
    with track_peak_memory() as memory:
        pass
    before = memory[0]
    started = time.monotonic()
    with track_peak_memory() as memory:
        method.fit(data, model, store, runner, console.log)
    fit, once = memory[0], once_of(method.fit_s, time.monotonic() - started)
    started = time.monotonic()
    with track_peak_memory() as memory:
        split = [parts(scores.facts) for scores in method.score(queries)]
    query = query_of(split, time.monotonic() - started)
    stored = sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file())
    return Cost(once, query, before, fit, memory[0], max(fit, memory[0], peak_memory()), stored)


def reason(error: Exception) -> str:
    """The line of an error that says why: a configuration's parser lists what each type that it tried has said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    causes_named = [line for line in causes if not line.startswith("Does not validate")]
    return (causes_named or lines or [type(error).__name__])[0]


def part_of(data: TrainingData, count: int) -> TrainingData:
    """So many training images and the same share of the null, chosen by hash."""
    assert data.latents is not None
    share = count / len(data.images)

    def some(latents: EncodedImages) -> EncodedImages:
        order = sorted(range(len(latents)), key=lambda row: hash_text(latents.ids[row]))
        return latents.subset(sorted(order[: max(1, round(share * len(latents)))]))

    train = some(data.latents)
    if data.held_out_latents is None:
        return TrainingData(train.images, train)
    null = some(data.held_out_latents)
    return TrainingData(train.images, train, null.images, null)


def cells(cost: Cost) -> list[str]:
    """A method's row."""
    once = [cost.once.get(name) for name in ONCE]
    query = [cost.query.get(name) for name in EACH]
    seconds = ["–" if value is None else f"{value:.3g}" for value in (*once, *query, cost.seconds)]
    scoring, fit = ((value - cost.before) / 2**20 for value in (cost.scoring, cost.fit))
    return [*seconds, f"{cost.peak / 2**30:.2f}", f"{fit:,.0f}", f"{scoring:,.0f}", f"{cost.stored / 2**20:,.1f}"]


def table(costs: Mapping[str, Cost], skipped: Mapping[str, str]) -> str:
    """The table in Markdown, and what was skipped below it."""
    titles = [
        "method",
        *(f"once: {name}, s" for name in ONCE.values()),
        *(f"{name}, s" for name in EACH.values()),
        "**a query, s**",
        "peak memory, GiB",
        "above model and data: once, MiB",
        "a query, MiB",
        "stored, MiB",
    ]
    made = markdown_table(titles, [[name, *cells(cost)] for name, cost in costs.items()])
    return "\n".join([made, *(f"\n{name} is skipped: {why}" for name, why in skipped.items())])


def prepare(options: argparse.Namespace) -> tuple[DiffusionModel, TrainingData, list[Query]]:
    """The model, the training data and the queries: training prompts, drawn again."""
    store = Store(options.output / "cache")
    model = load_model(options.model).to(Runner.current().device)
    data = training_data(Emoji(store=str(store.root)), model)
    assert data.latents is not None
    rows = choose_prompts(data.images, options.queries, options.seed)
    prompts = [data.images.captions[row][0] for row in rows]
    channels, height, width = data.latents.latent_shape
    queries = generate(
        model, prompts=prompts, seed=options.seed, shape=(channels, height, width), eta=1.0, keep_trajectory=True
    )
    return model, data if options.images is None else part_of(data, options.images), queries


def measured_with(options: argparse.Namespace, model: DiffusionModel) -> dict[str, Any]:
    """What the measurements belong to."""
    names = ("queries", "images", "timesteps", "noise_samples", "samples_per_image", "dimension", "seed")
    return {
        "model": model.fingerprint(),
        "threads": torch.get_num_threads(),
        **recorded_settings({name: getattr(options, name) for name in names}),
    }


def run_one(name: str, options: argparse.Namespace) -> None:
    """Measures one method and leaves what it took in its file: the work of a process of its own."""
    model, data, queries = prepare(options)
    record: dict[str, Any] = {"measured_with": measured_with(options, model), "file": method_file(name).read_text()}
    store = Store(options.output / "stores" / name)
    if store.root.exists():
        shutil.rmtree(store.root)  # what an interrupted run left would be found instead of made
    store.root.mkdir(parents=True)
    try:
        changed = quick_settings(
            timesteps=options.timesteps,
            noise_samples=options.noise_samples,
            samples_per_image=options.samples_per_image,
        )
        method = load_method(name, {**changed, "projection.dimension": options.dimension})
    except (ValueError, OSError) as error:
        record["skipped"] = reason(error)
    else:
        record |= {"attributor": method.identity(), "cost": asdict(measure(method, data, model, queries, store))}
    shutil.rmtree(store.root)
    write_json(options.output / f"{name}.json", record)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the methods and prints the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--model", default="weights/emoji")
    parser.add_argument("--output", type=Path, default=Path("runs/attribution_costs"))
    parser.add_argument("--methods", nargs="+", default=sorted(path.stem for path in METHODS.glob("*.yaml")))
    parser.add_argument("--queries", type=int, default=2)
    add_images(parser, help="only so many training images: a quick look, whose record stays in --output")
    parser.add_argument("--timesteps", type=int, default=3)
    add_noise_samples(parser, 500)
    add_samples_per_image(parser, 1)
    parser.add_argument("--dimension", type=int, default=256, help="of projected gradients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    if options.one is not None:
        run_one(options.one, options)
        return
    console, started = Console(), time.monotonic()
    console.log("images, latents and captions")
    model, data, _ = prepare(options)
    wanted = measured_with(options, model)
    costs: dict[str, Cost] = {}
    skipped: dict[str, str] = {}
    for number, name in enumerate(options.methods, start=1):
        file = options.output / f"{name}.json"
        record = json.loads(file.read_text()) if file.exists() else {}
        if record.get("measured_with") != wanted or record["file"] != method_file(name).read_text():
            console.log(f"{name}: method {number} of {len(options.methods)}")
            given = list(sys.argv[1:] if arguments is None else arguments)
            command = [sys.executable, "-m", "benchmarks.attribution", *given, "--one", name]
            subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            record = json.loads(file.read_text())
        if "skipped" in record:
            skipped[name] = record["skipped"]
        else:
            costs[name] = Cost(**record["cost"])
    print(table(costs, skipped))
    print(
        f"\nmeans of {options.queries} queries over {len(data.images):,} training images; {options.timesteps} "
        f"timesteps, {options.noise_samples} noise samples, {options.samples_per_image} samples an image of the "
        f"curvature, gradients projected to "
        f"{options.dimension} numbers, {wanted['threads']} threads; {duration(time.monotonic() - started)} in all"
    )
    folder = Path("results/emoji") if options.images is None else options.output
    write_json(
        folder / "attribution_costs.json",
        {
            "command": "python -m benchmarks.attribution",
            "measured_with": wanted,
            "training_pictures": len(data.images),
            "costs": {name: asdict(cost) for name, cost in costs.items()},
            "skipped": skipped,
        },
    )


if __name__ == "__main__":
    main()
