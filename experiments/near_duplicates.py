"""Near-duplicates: when the originals are gone, do their copies take over, and did the first ranking foresee it?

    OMP_NUM_THREADS=1 python -m experiments.near_duplicates

plants two copies (one pixel off, slightly recoloured, same caption) of each of 8 training images of emoji-1k, and
trains three models of about nine core-minutes each: with all 1,026 images, without the 8 originals, and without the
originals and their 16 copies. Each original's caption is drawn by the first model; the drawn images are attributed
under the first model, and under the second among what is left. Prints, for each method, where the originals and the
copies stand before and the copies after, whether the first ranking foresaw it, and what each removal does to the
queries' losses. Nothing is trained twice, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import train
from datamodules import Emoji
from datamodules.images import ImageDataModule
from experiments.known_answers import choose
from experiments.support.arguments import script_parser
from experiments.support.data import data_module
from lightning_modules.launch.recipe import Recipe
from lightning_modules.launch.runs import shapes, training_data_of
from wherefrom.attributors import Attributor
from wherefrom.commands.attribute import attribute
from wherefrom.commands.method_files import load_methods
from wherefrom.counterfactual.effects import measured_effects
from wherefrom.counterfactual.measurements import MeasurementTable
from wherefrom.counterfactual.query_panel import Panel
from wherefrom.counterfactual.reattribution import Reattribution, reattribution_folder, whole_ranking
from wherefrom.counterfactual.replacement_prediction import evaluate_replacement_prediction
from wherefrom.counterfactual.retraining import RetrainedModels, RetrainingJob
from wherefrom.counterfactual.sweep import Sweep
from wherefrom.data.copies import Copies
from wherefrom.metrics.standard_error import estimate
from wherefrom.queries.sources import QuerySource, generate
from wherefrom.runtime.artifacts import Store, replacing, write_json
from wherefrom.runtime.console import Console, Log, no_log
from wherefrom.runtime.distributed import Runner

# As in the counterfactual evaluation (emoji_1k_judge.yaml).
SETTINGS = {
    "grid.timesteps": 10,
    "grid.flips": False,
    "unlearning.noise_samples": 1000,
    "unlearning.relative_loss_increase": 1.0,
    "fisher.samples_per_image": 2,
}


@dataclass(frozen=True)
class Standing:
    """What one method says of one query.

    Attributes:
        original: Rank of the original, from 1.
        copies: Ranks of its copies beside it.
        left: Their ranks in the first ranking without the originals: what it foresaw.
        after: Their ranks under the model that was trained without the originals.
        spearman: Rank correlation of the two rankings of what is left.
        share: Share of as many first places afterwards as there are copies that the first ranking had next.
        chance: That share for a random order.
    """

    original: int
    copies: list[int]
    left: list[int]
    after: list[int]
    spearman: float
    share: float
    chance: float


def standing(
    first: Sequence[str], after: Sequence[str], original: str, copies: Sequence[str], gone: Sequence[str]
) -> Standing:
    """Where an original and its copies stand in two rankings.

    Args:
        first: Ids from the most influential, of all images.
        after: Those that are left, under the model that was trained without the originals.
        original: The query's original.
        copies: Its copies.
        gone: All originals.
    """
    seen, removed = evaluate_replacement_prediction(first, gone, after, len(copies)), set(gone)
    left = [name for name in first if name not in removed]

    def ranks(ids: Sequence[str], names: Sequence[str]) -> list[int]:
        places = {name: place for place, name in enumerate(ids, start=1)}
        return [places[name] for name in names]

    return Standing(
        ranks(first, [original])[0],
        ranks(first, copies),
        ranks(left, copies),
        ranks(after, copies),
        seen.spearman,
        seen.share,
        seen.chance,
    )


@dataclass(frozen=True)
class World:
    """The recipe with copies in its training set, and that set."""

    recipe: Recipe
    module: ImageDataModule


def planted(
    file: str | Path, *, copies: Copies | int, store: Store, output: Path, seed: int = 0, count: int = 2
) -> World:
    """A recipe that trains on the copies also.

    Args:
        file: The experiment file.
        copies: The copies, or of how many training images, chosen by hash.
        store: Where images and latents are kept.
        output: Where the experiment file with the copies goes.
        seed: Seed of the choice and of the copies.
        count: Copies of each image that is chosen.

    Raises:
        ValueError: The experiment's data cannot have copies, or an original is not in its training set.
    """
    config: dict[str, Any] = Recipe(file, store.root, train.main).config
    settings = config["data"]["init_args"]
    if "copies" not in settings:
        raise ValueError(f"{file} trains on {config['data']['class_path']}, which cannot plant copies; Emoji can.")
    if isinstance(copies, int):
        whole = data_module(config["data"], store).train_images
        copies = Copies([whole.ids[index] for index in choose(whole, copies, seed)], count, seed)
    settings["copies"] = asdict(copies)
    with replacing(output / "recipe.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(config))
    return World(Recipe(output / "recipe.yaml", store.root, train.main), data_module(config["data"], store))


def compare_copies(
    output: Path,
    *,
    world: World,
    copies: Copies,
    methods: Mapping[str, Attributor],
    store: Store,
    source: QuerySource = QuerySource(eta=1.0),
    timesteps: int = 200,
    seed: int = 0,
    log: Log = no_log,
) -> dict[str, Any]:
    """Trains the three models and compares the rankings.

    Args:
        output: Where the methods' run folders go.
        world: The recipe and its training set.
        copies: The copies in that set.
        methods: Name -> method.
        store: Where models are kept, and what methods make.
        source: How the originals' captions are drawn.
        timesteps: Timesteps of the queries' losses.
        seed: Seed of the trainings.
        log: Receives lines about what is being done.

    Returns:
        By original, each removal's change of the query's loss; by method and original, what `Standing` holds.
    """
    data, runner = training_data_of(world.module), Runner.current()
    assert data.latents is not None
    latents = data.latents
    models = RetrainedModels(
        store, world.recipe.identity(), latents.ids, latents.weighted_fingerprint, world.recipe.train
    )
    log("the model with all images")
    model = models.model(RetrainingJob((), seed)).to(runner.device)
    where = {name: index for index, name in enumerate(data.images.ids)}
    prompts = [data.images.captions[where[name]][0] for name in copies.ids]
    settings = {**vars(source), "prompts": prompts}
    source = QuerySource(**settings)
    queries = generate(
        model,
        prompts=prompts,
        seed=source.seed,
        shape=shapes(data)[0],
        sampling_steps=source.sampling_steps,
        guidance=source.guidance,
        eta=source.eta,
    )
    panel = Panel(queries, model, source, timesteps)
    gone = RetrainingJob(tuple(sorted(copies.ids)), seed)
    all_gone = RetrainingJob(tuple(sorted([*copies.ids, *copies.planted])), seed)
    sweep = Sweep(models, panel=panel, table=MeasurementTable(output / "retrains.parquet"), log=log)
    measured = sweep.measure([RetrainingJob((), seed), gone, all_gone])
    again = Reattribution(
        reattribution_folder(output),
        methods=methods,
        data=data,
        models=models,
        queries=queries,
        store=store,
        runner=runner,
        log=log,
    )
    standings: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        log(name)
        scores = attribute(
            output / name,
            attributor=method,
            data=data,
            model=model,
            queries=queries,
            store=store,
            runner=runner,
            log=log,
        )
        after = again(name, gone, [query.id for query in queries])
        standings[name] = {
            original: asdict(
                standing(whole_ranking(each), after[each.query.id], original, copies.of(original), copies.ids)
            )
            for original, each in zip(copies.ids, scores, strict=True)
        }
    moved = {
        words: measured_effects(measured[RetrainingJob((), seed)], measured[retrain])
        for words, retrain in (("originals", gone), ("originals and copies", all_gone))
    }
    losses = {
        words: {original: by[query.id]["loss"] for original, query in zip(copies.ids, queries, strict=True)}
        for words, by in moved.items()
    }
    return {"copies": asdict(copies), "training_pictures": len(data.images), "loss": losses, "standings": standings}


def report(result: Mapping[str, Any]) -> str:
    """The tables in Markdown: means over the queries ± standard errors; medians of ranks."""

    def cell(values: Sequence[float]) -> str:
        mean, error = estimate(np.array(values, dtype=np.float64))
        return f"{mean:.3g} ± {error:.1g}"

    lines = ["| left out | ΔL of the query |", "|---|---|"]
    lines += [f"| {words} | {cell(list(by.values()))} |" for words, by in result["loss"].items()]
    titles = [
        "method",
        "original, first",
        "copies, first",
        "copies among what is left: first",
        "after",
        "Spearman",
        "foreseen",
        "by chance",
    ]
    lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for method, by in result["standings"].items():
        each = list(by.values())
        medians = [np.median([one["original"] for one in each])]
        medians += [np.median([rank for one in each for rank in one[kind]]) for kind in ("copies", "left", "after")]
        means = [cell([one[kind] for one in each]) for kind in ("spearman", "share", "chance")]
        lines.append(f"| {' | '.join([method, *(f'{rank:.4g}' for rank in medians), *means])} |")
    queries = len(result["copies"]["ids"])
    lines += ["", f"{queries} queries over {result['training_pictures']:,} training images; ranks are medians."]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    arguments = script_parser(__doc__)
    arguments.add_argument("--recipe", default="configs/experiment/emoji_1k.yaml")
    arguments.add_argument("--originals", type=int, default=8, help="how many images have copies, chosen by hash")
    arguments.add_argument("--ids", nargs="+", help="these images instead")
    arguments.add_argument("--count", type=int, default=2, help="copies of each")
    arguments.add_argument("--methods", type=Path, nargs="+", help="attributor files")
    arguments.add_argument("--settings", type=json.loads, default=SETTINGS, help="as of evaluate.py counterfactual")
    arguments.add_argument("--sampling-steps", type=int, default=50)
    arguments.add_argument("--timesteps", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--store", default="cache")
    arguments.add_argument("--output", type=Path, default=Path("runs/near_duplicates"))
    arguments.add_argument("--results", type=Path, default=Path("results/emoji/near_duplicates.json"))
    options = arguments.parse_args(args)
    files = options.methods or [Path(f"configs/attributor/{name}.yaml") for name in ("abu_plus", "pixel", "caption")]
    console, store = Console(), Store(options.store)
    asked = options.originals if options.ids is None else Copies(options.ids, options.count, options.seed)
    world = planted(
        options.recipe, copies=asked, store=store, output=options.output, seed=options.seed, count=options.count
    )
    assert isinstance(world.module, Emoji)
    assert world.module.copies is not None
    copies = world.module.copies
    methods = load_methods(files, options.settings)
    for method in methods.values():
        method.progress = console.progress
    source = QuerySource(sampling_steps=options.sampling_steps, eta=1.0, seed=options.seed)
    result = compare_copies(
        options.output,
        world=world,
        copies=copies,
        methods=methods,
        store=store,
        source=source,
        timesteps=options.timesteps,
        seed=options.seed,
        log=console.log,
    )
    print(report(result))
    given = {name: value for name, value in vars(options).items() if name not in ("output", "results", "store")}
    given |= {"methods": [str(file) for file in files]}
    write_json(options.results, {"command": "python -m experiments.near_duplicates", "options": given, **result})


if __name__ == "__main__":
    main()
