"""What a query costs a teacher by the influence bank, and by exact AbU+ over the whole training set; and what is lost.

    python -m benchmarks.teacher
    python -m benchmarks.teacher --model weights/emoji --data configs/data/emoji.yaml --queries 2

Both take the same curvature, timesteps, mirror images and draws; the curvature, which both need once, is in neither
cost. *Training side*: for the bank its making, shared by all queries, and a matrix product each; for AbU+ the losses
before unlearning, shared, and the losses after it for each query. *In total* also counts each query's gradient and,
for AbU+, the search of its step. Then: mAP(k) of the bank's ranking against exact AbU+, where the bank puts AbU+'s
first image, and how many of AbU+'s first are among K candidates that looks (EfficientNet) or gradients (the bank's
first, or both of its tails) choose.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import spearmanr

import datamodules  # noqa: F401  so that YAML may use short class names
from experiments.support.arguments import add_noise_samples, add_samples_per_image, script_parser
from experiments.support.data import made_data_module
from experiments.support.recall import recalls
from lightning_modules.launch.runs import shapes, training_data
from wherefrom.attributors import AttributionByUnlearning, ImageSimilarity, InfluenceBank, Scores, TrainingData
from wherefrom.attributors.influence.gradient_bank import Compression
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings
from wherefrom.curvature import EKFAC, FisherSettings
from wherefrom.features.base import EfficientNetLite0Encoder
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.metrics.retrieval import MeanAveragePrecision, top_of
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import generate
from wherefrom.rankings.ranking_file import normalised_ranks
from wherefrom.runtime.artifacts import Store, write_json
from wherefrom.runtime.console import Console, duration
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.keyed_random import hash_text

QUERIES, TIMESTEPS = (1, 10, 100, 1000), 10
RESULT = Path("results/emoji/teacher_costs.json")


def matrix(results: Sequence[Scores]) -> Float[NDArray[np.float64], "q n"]:
    """All scores."""
    return np.stack([scores.scores for scores in results])


def costs(once: float, each: float, queries: int) -> float:
    """Seconds a query."""
    return once / queries + each


def main() -> None:
    """Measures and prints."""
    parser = script_parser(__doc__)
    parser.add_argument("--model", default="weights/emoji_1k")
    parser.add_argument("--data", default="configs/data/emoji_1k.yaml")
    parser.add_argument("--queries", type=int, default=6)
    parser.add_argument("--timesteps", type=int, default=TIMESTEPS)
    add_noise_samples(parser, 1000)
    add_samples_per_image(parser, 2)
    parser.add_argument(
        "--keep",
        default="factors",
        help="how the bank keeps rows; see wherefrom.attributors.influence.gradient_bank.Compression",
    )
    parser.add_argument("--dimension", type=int, help="numbers of a row of the bank, but for factors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/teacher"))
    options = parser.parse_args()
    console, store, runner = Console(), Store(options.output / "cache"), Runner.current()
    model = load_model(options.model).to(runner.device)
    whole = training_data(made_data_module(options.data, store), model)
    data = TrainingData(whole.images, whole.latents)  # no null: nothing but the training set is timed
    ids = data.images.ids
    rows = sorted(range(len(ids)), key=lambda row: hash_text(f"teacher/{options.seed}/{ids[row]}"))[: options.queries]
    prompts = [data.images.captions[row][0] for row in rows]
    queries = generate(model, prompts=prompts, seed=options.seed, shape=shapes(data)[0], eta=1.0)
    for kind in ("bank", "whitened_squares", "losses"):  # what an earlier run left would be found instead of made
        shutil.rmtree(store.root / kind, ignore_errors=True)
    grid, fisher = LossGrid(options.timesteps), FisherSettings(options.samples_per_image)
    methods = {
        "bank": InfluenceBank(
            noise_samples=options.noise_samples,
            grid=grid,
            curvature=EKFAC(fisher),
            compression=Compression(options.keep, options.dimension),
        ),
        "abu_plus": AttributionByUnlearning(
            unlearning=UnlearningSettings(noise_samples=options.noise_samples), grid=grid, curvature=EKFAC(fisher)
        ),
    }
    results: dict[str, list[Scores]] = {}
    for name, method in methods.items():
        console.log(name)
        method.progress = console.progress
        method.fit(data, model, store, runner, console.log)
        results[name] = list(method.score(queries))
    looks = ImageSimilarity(EfficientNetLite0Encoder())
    looks.fit(data, model, store, runner, console.log)
    started = time.monotonic()
    similar = matrix(list(looks.score(queries)))
    looks_s = (time.monotonic() - started) / len(queries)

    def mean(name: str, fact: str) -> float:
        return float(np.mean([scores.facts[fact] for scores in results[name]]))

    bank_once, before = methods["bank"].fit_s["bank"], methods["abu_plus"].fit_s["losses"]
    product, gradient = mean("bank", "product_s"), mean("bank", "gradient_s")
    after, unlearn = mean("abu_plus", "losses_s"), mean("abu_plus", "unlearning_s")
    print(
        f"\n{len(ids):,} images, {options.timesteps} timesteps, {options.noise_samples} noise samples; {runner.device}"
    )
    print(f"bank: {bank_once:.1f} s once; a query: gradient {gradient:.2f} s, product {product:.4f} s")
    print(f"AbU+: {before:.1f} s once; a query: gradient and step {unlearn:.2f} s, losses {after:.2f} s")
    ratios = {}
    print("| queries | training side, AbU+ / bank | in total |\n|---|---|---|")
    for count in QUERIES:
        side = costs(before, after, count) / costs(bank_once, product, count)
        total = costs(before, after + unlearn, count) / costs(bank_once, product + gradient, count)
        ratios[str(count)] = {"training_side": side, "total": total}
        print(f"| {count:,} | {side:.1f}× | {total:.1f}× |")
    exact, fast = matrix(results["abu_plus"]), matrix(results["bank"])
    agreement = quality(exact, fast, ids)
    agreement["split-half reliability of AbU+"] = mean("abu_plus", "split_half_reliability")
    print("\nthe bank against exact AbU+:", ", ".join(f"{name} {value:.3f}" for name, value in agreement.items()))
    first = [float(normalised_ranks(ids, one)[int(each.argmax())]) for each, one in zip(exact, fast, strict=True)]
    print("where the bank puts AbU+'s first image (0 first, 1 last):", ", ".join(f"{place:.3f}" for place in first))
    candidates = [max(1, round(share * len(ids))) for share in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)]
    chosen = {"looks": similar, "bank, first": fast, "bank, both tails": fast}
    recall = {str(top): recalls(exact, ids, chosen, top, candidates) for top in (1, 10, 100)}
    print(f"\n| of AbU+'s first | chosen by | {' | '.join(f'K = {k}' for k in candidates)} |")
    print("|---|---" + "|---" * len(candidates) + "|")
    for top, by in recall.items():
        for name, shares in by.items():
            print(f"| {top} | {name} | {' | '.join(f'{share:.2f}' for share in shares)} |")
    record = {
        "command": " ".join(["python -m benchmarks.teacher", *sys.argv[1:]]),
        "settings": {name: str(value) for name, value in vars(options).items() if name != "output"},
        "training_pictures": len(ids),
        "seconds": {
            "bank_once": bank_once,
            "product": product,
            "gradient": gradient,
            "losses_before": before,
            "losses_after": after,
            "gradient_and_step": unlearn,
            "looks": looks_s,
        },
        "ratios": ratios,
        "agreement": agreement,
        "first": first,
        "candidates": candidates,
        "recall": recall,
    }
    unusual = [options.keep] * (options.keep != "factors")
    unusual += [f"{options.timesteps}_timesteps"] * (options.timesteps != TIMESTEPS)
    name = "_".join([Path(options.model).name, *unusual])
    write_json(RESULT if name == "emoji_1k" else RESULT.with_stem(f"{RESULT.stem}_{name}"), record)
    console.log(f"gradient of one query: {duration(gradient)}")


def quality(
    exact: Float[NDArray[np.float64], "q n"], fast: Float[NDArray[np.float64], "q n"], ids: Sequence[str]
) -> dict[str, float]:
    """Rank correlation and mAP(k) of one method's scores against another's."""
    result = {"Spearman": float(np.mean([spearmanr(a, b).statistic for a, b in zip(exact, fast, strict=True)]))}
    for k in dict.fromkeys((10, *(max(1, round(share * len(ids))) for share in (0.0042, 0.0085, 0.034)))):
        metric = MeanAveragePrecision()
        metric.update(torch.from_numpy(fast), top_of(torch.from_numpy(exact), k))
        result[f"mAP({k})"] = float(metric.compute()["mean"])
    return result


if __name__ == "__main__":
    main()
