"""The main job's checks for every method, and how many timesteps attribution by unlearning needs.

    python -m experiments.method_table
    python -m experiments.method_table --ablation

The queries are those of `experiments.known_answers`. Methods are files of `configs/attributor`, at the few timesteps
and noise samples that are given here. A method's ranks go into `results/emoji/method_table.json` when it is done, and
are not computed again for the same model and settings; an interrupted method goes on where it stopped. With
`--candidates`, and in the ablation, only a fixed random part of the training images is scored, besides those that must
be found, and an interrupted method starts anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import spearmanr

from datamodules import Emoji
from experiments.alignment import rate
from experiments.known_answers import Case, cell, make_cases, ranks
from experiments.support.arguments import (
    add_noise_samples,
    add_relative_loss_increase,
    add_samples_per_image,
    script_parser,
)
from experiments.support.markdown import markdown_table
from experiments.support.methods import load_method, quick_settings
from experiments.support.records import read_record
from lightning_modules.launch.runs import training_data
from wherefrom.attributors import AttributionByUnlearning, Attributor, Scores, TrainingData
from wherefrom.commands.attribute import attribute
from wherefrom.data.image_set import ImageSet
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_model
from wherefrom.runtime.artifacts import Store, identity_hash, write_json
from wherefrom.runtime.console import Console, duration
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.keyed_random import hash_text

RESULTS = Path("results/emoji/method_table.json")
ABLATION = Path("results/emoji/timesteps.json")
TOP = 100
METHODS = (
    "abu",
    "abu_plus",
    "influence",
    "trak",
    "d_trak",
    "journey_trak",
    "efficientnet",
    "caption",
    "pixel",
    "random",
    "abu_sgd",
    "abu_all_weights",
    "abu_square_output",
    "abu_equal_timesteps",
    "abu_plus_equal_timesteps",
)


def same_style(results: Sequence[Scores], data: TrainingData) -> Float[NDArray[np.float64], " n"]:
    """Share of the top 100 that is drawn in the style of the prompt, for each query."""
    style_of = dict(zip(data.images.ids, data.images.columns["style"], strict=True))
    result = []
    for scores in results:
        wanted = next(style for style in set(style_of.values()) if scores.query.prompt.endswith(f"{style} style"))
        result.append(np.mean([style_of[name] == wanted for name, _ in scores.top(TOP)]))
    return np.array(result)


def measure(results: Sequence[Scores], cases: Mapping[str, Sequence[Case]], data: TrainingData) -> dict[str, Any]:
    """What one method's row is made of: numbers for each query, by check."""
    result: dict[str, Any] = {}
    start = 0
    for kind, part in cases.items():
        mine = results[start : start + len(part)]
        start += len(part)
        for target in part[0].targets:
            result[f"{kind}/{target}"] = ranks(mine, part, target).tolist()
        result[f"{kind}/same style"] = same_style(mine, data).tolist()
    for fact in ("split_half_reliability", "seconds"):
        result[fact] = [scores.facts[fact] for scores in results if fact in scores.facts]
    return result


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown, of the methods' records."""
    checks = {
        "own prompt: other style": "own/other style",
        "crossed: A itself": "crossed/own",
        "crossed: A, other style": "crossed/other style",
        "crossed: the prompt's image": "crossed/prompt's",
        "held-out prompt: other style": "held-out/other style",
    }
    titles = [
        "method",
        "images scored",
        "own image in the top 1 %",
        *checks,
        "style of the prompt in the top 100",
        "reliability",
    ]
    lines = []
    for name, record in rows.items():
        numbers = {key: np.array(values) for key, values in record["ranks"].items()}
        styles = np.concatenate([numbers[key] for key in numbers if key.endswith("same style")])
        reliability = numbers["split_half_reliability"]
        first = rate(numbers["own/own"] < 0.01)
        cells = [name, f"{record['pictures']:,}", f"{first.value:.0%} ± {first.error:.0%}"]
        cells += [cell(numbers[key]) for key in checks.values()]
        cells += [f"{styles.mean():.2f} ± {styles.std(ddof=1) / np.sqrt(len(styles)):.2f}"]
        cells += [f"{np.median(reliability):.2f}" if len(reliability) else "–"]
        lines.append(cells)
    return markdown_table(titles, lines)


def choose_candidates(images: ImageSet, cases: Sequence[Case], count: int, seed: int) -> list[str]:
    """Training images chosen by hash, and those that must be found."""
    order = sorted(images.ids, key=lambda name: hash_text(f"candidates/{seed}/{name}"))
    return sorted({*order[:count], *(name for case in cases for name in case.targets.values())})


def timed(results: Iterator[Scores]) -> Iterator[Scores]:
    """The same results, each with the seconds that it took."""
    started = time.monotonic()
    for scores in results:
        yield replace(scores, facts={**scores.facts, "seconds": time.monotonic() - started})
        started = time.monotonic()


def ablation(
    model: DiffusionModel, data: TrainingData, cases: Sequence[Case], store: Store, options: argparse.Namespace
) -> dict[str, Any]:
    """AbU and AbU+ at several numbers of timesteps: reliability, agreement with the most, rank of the own image.

    Only the candidates' losses are measured, but the curvature is that of all training images.
    """
    candidates = choose_candidates(data.images, cases, options.candidates or 200, options.seed)
    assert data.latents is not None
    positions = [data.latents.ids.index(name) for name in candidates]
    part = TrainingData(data.images.subset(positions), data.latents.subset(positions))  # no null: p-values are not read
    queries, result = [case.query for case in cases], {}
    runner, console = Runner.current(), Console()
    for method in ("abu", "abu_plus"):
        results: dict[int, list[Scores]] = {}
        whole = load_method(method, settings(options))
        assert isinstance(whole, AttributionByUnlearning)
        whole.prepare(data, model, store, runner, console.log)
        for timesteps in options.timestep_ladder:
            console.log(f"{method} at {timesteps} timesteps")
            attributor = load_method(method, {**settings(options), "grid.timesteps": timesteps})
            assert isinstance(attributor, AttributionByUnlearning)
            attributor.progress = console.progress
            attributor.fit(part, model, store, runner, console.log)
            attributor.curvature_matrix = whole.curvature_matrix
            results[timesteps] = list(attributor.score(queries))
        most = results[max(results)]
        for timesteps, scored in results.items():
            pairs = list(zip(scored, most, strict=True))
            result[f"{method}/{timesteps}"] = {
                "reliability": [scores.facts["split_half_reliability"] for scores in scored],
                "spearman with the most": [float(spearmanr(one.scores, best.scores).statistic) for one, best in pairs],
                "own": ranks(scored, cases, "own").tolist(),
                "other style": ranks(scored, cases, "other style").tolist(),
                "losses_s": [scores.facts["losses_s"] for scores in scored],
            }
    return {"candidates": len(candidates), "rows": result}


def ablation_table(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The ablation in Markdown: medians over the queries."""
    titles = ["method", "timesteps", *next(iter(rows.values()))]
    lines = [
        [*name.split("/"), *(f"{np.median(values):.3f}" for values in result.values())] for name, result in rows.items()
    ]
    return markdown_table(titles, lines)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What replaces the files' settings."""
    return quick_settings(
        timesteps=options.timesteps,
        noise_samples=options.noise_samples,
        samples_per_image=options.samples_per_image,
        relative_loss_increase=options.relative_loss_increase,
    )


def row_identity(shared: Mapping[str, Any], attributor: Attributor, candidates: int | None) -> str:
    """What a method's row belongs to: model, queries, the method's settings and what it scored."""
    return identity_hash({**shared, "attributor": attributor.identity(), "candidates": candidates})


def main() -> None:
    """Runs the methods that have no row yet and prints the table."""
    arguments = script_parser(__doc__)
    arguments.add_argument("--model", default="weights/emoji")
    arguments.add_argument("--output", default="runs/method_table")
    arguments.add_argument("--methods", nargs="+", default=list(METHODS))
    arguments.add_argument("--own", type=int, default=20)
    arguments.add_argument("--crossed", type=int, default=10)
    arguments.add_argument("--held-out", type=int, default=10)
    arguments.add_argument("--timesteps", type=int, default=5)
    add_noise_samples(arguments, 1000)
    add_samples_per_image(arguments, 2)
    add_relative_loss_increase(
        arguments, None, "by which share a step raises a query's loss; the methods' own by default"
    )
    arguments.add_argument("--eta", type=float, default=1.0, help="noise that the sampler adds back; 0 is DDIM")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--ablation", action="store_true", help="the ablation of timesteps instead")
    arguments.add_argument("--ablation-queries", type=int, default=5)
    arguments.add_argument("--timestep-ladder", type=int, nargs="+", default=[5, 10, 20, 200])
    arguments.add_argument("--candidates", type=int, help="random training images scored; all by default, or 200")
    arguments.add_argument("--results", type=Path, default=RESULTS, help="where each method's ranks go")
    options = arguments.parse_args()
    torch.set_float32_matmul_precision("high")
    output, console = Path(options.output), Console()
    store, runner = Store(output / "cache"), Runner.current()
    model = load_model(options.model).to(runner.device)
    data = training_data(Emoji(store=str(store.root)), model)
    counts = {"own": options.own, "crossed": options.crossed, "held-out": options.held_out}
    cases = make_cases(data, model, counts, options.seed, options.eta)
    assert model.encoder is not None
    flat = [case for part in cases.values() for case in part]
    shared = {
        "model": model.fingerprint(),
        "decoder": model.encoder.decoder_identity(),
        "queries": [[case.query.id, case.query.prompt] for case in flat],
    }
    if options.ablation:
        record = ablation(model, data, cases["own"][: options.ablation_queries], store, options)
        write_json(ABLATION, {"command": "python -m experiments.method_table --ablation", **shared, **record})
        print(ablation_table(record["rows"]))
        return
    rows = {}
    for method in options.methods:
        attributor = load_method(method, settings(options))
        identity = row_identity(shared, attributor, options.candidates)
        known = read_record(options.results).get("methods", {}).get(method, {})
        if known.get("identity") != identity:
            console.log(f"{method}: {len(flat)} queries")
            attributor.progress = console.progress
            queries = [case.query for case in flat]
            if options.candidates is None:
                results = attribute(
                    output / method,
                    attributor=attributor,
                    data=data,
                    model=model,
                    queries=queries,
                    store=store,
                    runner=runner,
                    log=console.log,
                )
            else:
                attributor.fit(data, model, store, runner, console.log)
                part = choose_candidates(data.images, flat, options.candidates, options.seed)
                results = list(timed(attributor.score(queries, part)))
            known = {
                "identity": identity,
                "attributor": attributor.identity(),
                "pictures": len(results[0].ids),
                "ranks": measure(results, cases, data),
            }
            record = {**read_record(options.results).get("methods", {}), method: known}
            write_json(options.results, {"command": "python -m experiments.method_table", **shared, "methods": record})
        rows[method] = known
    print(table(rows))
    total = sum(sum(row["ranks"]["seconds"]) for row in rows.values())
    print(
        f"\n{sum(counts.values())} queries over {len(data.images):,} training images; {options.timesteps} "
        f"timesteps, {options.noise_samples} noise samples, {options.samples_per_image} samples an "
        f"image of the curvature; {duration(total)} of scoring"
    )


if __name__ == "__main__":
    main()
