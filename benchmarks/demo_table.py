"""The main job's table: does attribution find what must be found?

    python -m benchmarks.demo_table

Draws pictures from the committed emoji model and attributes them by unlearning and by the three baselines. Every query
has a known answer:

* own: the picture and its own prompt, a training caption. (a) Is the training picture with that caption in the top 1
    %? (b) Where is the same
  concept in the other style?
* crossed: the picture of A with the prompt of B. Where is A, in its own and in the other style?
* held-out: the prompt is a (concept, style) pair that was never trained on. Where is the concept in the other style?

Everything is rebuilt below `runs/demo_table`; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from datamodules import Emoji
from evaluate import training_data
from wherefrom.attribution import attribute
from wherefrom.attributors import (
    AttributionByUnlearning,
    Attributor,
    CaptionSimilarity,
    PixelSimilarity,
    Query,
    Random,
    Scores,
    TrainingData,
)
from wherefrom.curvature import FisherSettings
from wherefrom.data.pictures import Pictures
from wherefrom.diffusion import DiffusionModel
from wherefrom.evaluation.ranking import normalised_ranks
from wherefrom.keyed import hash_text
from wherefrom.losses import LossGrid
from wherefrom.pipeline import load_model
from wherefrom.progress import Console, peak_memory
from wherefrom.queries import generate
from wherefrom.runner import Runner
from wherefrom.storage import Store, replacing
from wherefrom.unlearning import UnlearningSettings


@dataclass(frozen=True)
class Case:
    """A query and the training pictures that it should find."""

    query: Query
    targets: Mapping[str, str]


def choose(pictures: Pictures, count: int, seed: int) -> list[int]:
    """Training pictures of distinct concepts that stay in training in both styles, by hash."""
    styles_of: dict[str, set[str]] = {}
    for concept, style in zip(pictures.columns["concept"], pictures.columns["style"], strict=True):
        styles_of.setdefault(concept, set()).add(style)
    order = sorted(range(len(pictures)), key=lambda index: hash_text(f"demo table/{seed}/{pictures.ids[index]}"))
    chosen: dict[str, int] = {}
    for index in order:
        concept = pictures.columns["concept"][index]
        if len(styles_of[concept]) == 2 and concept not in chosen:
            chosen[concept] = index
        if len(chosen) == count:
            break
    return list(chosen.values())


def other_style(name: str) -> str:
    """The id of the same concept in the other style."""
    style, concept = name.split("/")
    return f"{'openmoji' if style == 'twemoji' else 'twemoji'}/{concept}"


def make_cases(
    data: TrainingData, model: DiffusionModel, counts: Mapping[str, int], seed: int, eta: float
) -> dict[str, list[Case]]:
    """The three sets of queries."""
    assert data.latents is not None
    assert data.held_out is not None
    channels, rows, columns = (int(side) for side in data.latents.latents.shape[2:])
    pictures, held_out = data.pictures, data.held_out
    own = choose(pictures, counts["own"], seed)
    unseen = sorted(range(len(held_out)), key=lambda i: hash_text(f"demo table/{seed}/{held_out.ids[i]}"))[
        : counts["held-out"]
    ]
    prompts = [pictures.captions[index][0] for index in own] + [held_out.captions[index][0] for index in unseen]
    drawn = generate(model, prompts, seed, (channels, rows, columns), eta=eta)
    cases: dict[str, list[Case]] = {"own": [], "crossed": [], "held-out": []}
    for index, query in zip(own, drawn, strict=False):
        name = pictures.ids[index]
        cases["own"].append(Case(query, {"own": name, "other style": other_style(name)}))
    for index, query in zip(unseen, drawn[len(own) :], strict=True):
        cases["held-out"].append(Case(query, {"other style": other_style(held_out.ids[index])}))
    for position in range(counts["crossed"]):
        a, b = cases["own"][position], cases["own"][(position + counts["own"] // 2) % counts["own"]]
        query = replace(a.query, id=f"{a.query.id}x{b.query.id}", prompt=b.query.prompt)
        targets = {"own": a.targets["own"], "other style": a.targets["other style"], "prompt's": b.targets["own"]}
        cases["crossed"].append(Case(query, targets))
    return cases


def ranks(results: Sequence[Scores], cases: Sequence[Case], target: str) -> Float[NDArray[np.float64], "n"]:
    """Normalised rank of each case's target."""
    found = []
    for scores, case in zip(results, cases, strict=True):
        found.append(normalised_ranks(scores.ids, scores.scores)[scores.ids.index(case.targets[target])])
    return np.array(found)


def cell(values: Float[NDArray[np.float64], "n"]) -> str:
    """Median, and mean ± standard error."""
    return f"{np.median(values):.3f} ({values.mean():.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f})"


def table(all_ranks: Mapping[str, Mapping[str, Float[NDArray[np.float64], "n"]]]) -> str:
    """The table in Markdown."""
    lines = [
        "| method | (a) own picture in the top 1 % | (b) own prompt: other style | (c) crossed: A itself | (c) "
        "crossed: A in the other style "
        "| (c) held-out prompt: other style |",
        "|---|---|---|---|---|---|",
    ]
    for method, found in all_ranks.items():
        first = found["own/own"] < 0.01
        error = np.sqrt(first.mean() * (1 - first.mean()) / len(first))
        cells = [
            cell(found[name])
            for name in ("own/other style", "crossed/own", "crossed/other style", "held-out/other style")
        ]
        lines.append(f"| {method} | {first.mean():.0%} ± {error:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="weights/emoji")
    arguments.add_argument("--output", default="runs/demo_table")
    arguments.add_argument("--own", type=int, default=20)
    arguments.add_argument("--crossed", type=int, default=10)
    arguments.add_argument("--held-out", type=int, default=10)
    arguments.add_argument("--timesteps", type=int, default=5)
    arguments.add_argument("--draws", type=int, default=1000)
    arguments.add_argument("--rise", type=float, default=0.2)
    arguments.add_argument("--eta", type=float, default=1.0, help="noise that the sampler adds back; 0 is DDIM")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    torch.set_float32_matmul_precision("high")
    output, console = Path(options.output), Console()
    store, runner = Store(output / "cache"), Runner.current()
    model = load_model(options.model).to(runner.device)
    console.say("pictures, latents and captions")
    data = training_data(Emoji(store=str(store.root)), model)
    console.say("queries")
    counts = {"own": options.own, "crossed": options.crossed, "held-out": options.held_out}
    cases = make_cases(data, model, counts, options.seed, options.eta)
    flat = [case for part in cases.values() for case in part]
    abu = AttributionByUnlearning(
        unlearning=UnlearningSettings(draws=options.draws, rise=options.rise),
        grid=LossGrid(timesteps=options.timesteps),
        fisher=FisherSettings(visits=2),
    )
    abu.progress = console.progress
    methods: dict[str, Attributor] = {
        "attribution by unlearning": abu,
        "caption similarity": CaptionSimilarity(),
        "pixel similarity": PixelSimilarity(),
        "random": Random(),
    }
    all_ranks: dict[str, dict[str, Float[NDArray[np.float64], "n"]]] = {}
    reliability: list[float] = []
    for name, method in methods.items():
        console.say(f"{name}: {len(flat)} queries")
        folder = output / name.replace(" ", "_")
        results = attribute(folder, method, data, model, [case.query for case in flat], store, runner, say=console.say)
        found, start = {}, 0
        for kind, part in cases.items():
            mine = results[start : start + len(part)]
            start += len(part)
            for target in part[0].targets:
                found[f"{kind}/{target}"] = ranks(mine, part, target)
        all_ranks[name] = found
        reliability += [
            scores.facts["split_half_reliability"] for scores in results if "split_half_reliability" in scores.facts
        ]
    text = table(all_ranks)
    print(text)
    print(
        f"\n{options.own} own, {options.crossed} crossed and {options.held_out} held-out queries over "
        f"{len(data.pictures):,} training pictures; "
        f"{options.timesteps} timesteps, {options.draws} draws, a rise of {options.rise:.0%}; median split-half "
        "reliability "
        f"{np.median(reliability):.2f}; peak resident memory {peak_memory() / 2**30:.1f} GiB"
    )
    Path("results/emoji").mkdir(parents=True, exist_ok=True)
    with replacing(Path("results/emoji/demo_table.json")) as temporary:
        record = {
            "command": "python -m benchmarks.demo_table",
            "options": vars(options),
            "model": model.fingerprint(),
            "split_half_reliability": reliability,
            "ranks": {
                name: {key: values.tolist() for key, values in found.items()} for name, found in all_ranks.items()
            },
        }
        temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
