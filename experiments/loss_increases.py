"""Over which relative loss increases is the ranking stable? They set the step size of unlearning.

    python -m experiments.loss_increases

Attributes a few images drawn by the committed emoji model at several increases and prints, for each: the rank
correlation with the default's ranking and how much of its top 100 is kept, the split-half reliability, and where the
training image with the prompt's own caption comes. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from datamodules import Emoji
from experiments.known_answers import choose
from experiments.support.arguments import add_noise_samples, script_parser
from lightning_modules.launch.runs import training_data
from wherefrom.attributors import AttributionByUnlearning, Scores
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings
from wherefrom.commands.attribute import attribute
from wherefrom.curvature import DiagonalFisher, FisherSettings
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import generate
from wherefrom.rankings.ranking_file import normalised_ranks
from wherefrom.runtime.artifacts import Store, replacing
from wherefrom.runtime.console import Console
from wherefrom.runtime.distributed import Runner

DEFAULT_INCREASE = UnlearningSettings().relative_loss_increase
TOP = 100


@dataclass(frozen=True)
class Row:
    """One relative loss increase: a number for each query.

    Attributes:
        alpha: The step size that it took.
        spearman: Rank correlation with the ranking at the default one.
        top_kept: Share of the default's top 100 that is in this top 100.
        reliability: Split-half reliability.
        own_rank: Rank, from 1, of the training image with the prompt's caption.
    """

    alpha: list[float]
    spearman: list[float]
    top_kept: list[float]
    reliability: list[float]
    own_rank: list[int]


def compare(result: Mapping[float, Sequence[Scores]], own: Sequence[str]) -> dict[float, Row]:
    """Each relative loss increase against the default one, query by query."""
    assert DEFAULT_INCREASE is not None
    rows = {}
    for relative_loss_increase, results in result.items():
        row = Row([], [], [], [], [])
        for scores, reference, name in zip(results, result[DEFAULT_INCREASE], own, strict=True):
            positions = np.rint(normalised_ranks(scores.ids, scores.scores) * len(scores.ids)).astype(int)
            row.alpha.append(float(scores.facts["alpha"]))
            row.spearman.append(float(spearmanr(scores.scores, reference.scores).statistic))
            top, kept = ({image for image, _ in one.top(TOP)} for one in (scores, reference))
            row.top_kept.append(len(top & kept) / TOP)
            row.reliability.append(float(scores.facts["split_half_reliability"]))
            row.own_rank.append(int(positions[scores.ids.index(name)]) + 1)
        rows[relative_loss_increase] = row
    return rows


def table(rows: Mapping[float, Row]) -> str:
    """The table in Markdown: medians, and all ranks of the own images."""
    lines = [
        "| relative loss increase | α | Spearman with the default | its top 100 kept | split-half reliability | "
        "rank of the own image |",
        "|---|---|---|---|---|---|",
    ]
    for relative_loss_increase, row in rows.items():
        medians = [np.median(values) for values in (row.spearman, row.top_kept, row.reliability)]
        cells = [f"{relative_loss_increase:.0%}", f"{np.median(row.alpha):.2g}", *(f"{value:.2f}" for value in medians)]
        lines.append(f"| {' | '.join(cells)} | {', '.join(map(str, row.own_rank))} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the comparison."""
    arguments = script_parser(__doc__)
    arguments.add_argument("--model", default="weights/emoji")
    arguments.add_argument("--output", default="runs/rises")
    arguments.add_argument("--queries", type=int, default=4)
    arguments.add_argument(
        "--increases", "--rises", dest="increases", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    )
    arguments.add_argument("--timesteps", type=int, default=5)
    add_noise_samples(arguments, 1000)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    if DEFAULT_INCREASE not in options.increases:
        arguments.error(f"--increases must include {DEFAULT_INCREASE}, with which the others are compared")
    torch.set_float32_matmul_precision("high")
    output, console = Path(options.output), Console()
    store, runner = Store(output / "cache"), Runner.current()
    model = load_model(options.model).to(runner.device)
    data = training_data(Emoji(store=str(store.root)), model)
    assert data.latents is not None
    channels, height, width = data.latents.latent_shape
    rows = choose(data.images, options.queries, options.seed)
    queries = generate(
        model,
        prompts=[data.images.captions[row][0] for row in rows],
        seed=options.seed,
        shape=(channels, height, width),
    )
    result = {}
    for relative_loss_increase in sorted(options.increases):
        console.log(f"relative loss increase {relative_loss_increase:.0%}")
        abu = AttributionByUnlearning(
            unlearning=UnlearningSettings(
                noise_samples=options.noise_samples, relative_loss_increase=relative_loss_increase
            ),
            grid=LossGrid(timesteps=options.timesteps),
            curvature=DiagonalFisher(FisherSettings(samples_per_image=2)),
        )
        abu.progress = console.progress
        result[relative_loss_increase] = attribute(
            output / f"rise_{relative_loss_increase}",
            attributor=abu,
            data=data,
            model=model,
            queries=queries,
            store=store,
            runner=runner,
            log=console.log,
        )
    compared = compare(result, [data.images.ids[row] for row in rows])
    print(table(compared))
    print(
        f"\n{options.queries} queries over {len(data.images):,} training images, {options.timesteps} timesteps, "
        f"{options.noise_samples} noise samples; medians over the queries"
    )
    record = {
        "command": "python -m experiments.loss_increases",
        "options": vars(options),
        "model": model.fingerprint(),
        "rises": {str(relative_loss_increase): vars(row) for relative_loss_increase, row in compared.items()},
    }
    Path("results/emoji").mkdir(parents=True, exist_ok=True)
    with replacing(Path("results/emoji/rises.json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
