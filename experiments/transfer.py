"""Does a ranker still serve when the model is trained again? With another seed, with and without a warm start.

    python -m experiments.transfer

Trains emoji-1k with another seed (as the seed-variance baseline does: once for both), and has the bank rank all
training images for the same prompts under both models. Rankers: one that learned from the first model, as it is; one
that learns from the second model's `--queries` alone; and one that starts from the first's and learns from these. All
are measured on the second model's test queries. Beside them, how far both models' own rankings agree: what a ranker of
the first could reach at best. What was trained or curated is not made again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

import evaluate
import train
from experiments.ranker_table import BOTH, TRAIN, Variant, average_precisions, cosines_of, matrix_of, train_one
from experiments.support.arguments import script_parser
from experiments.support.data import data_module
from experiments.support.markdown import markdown_table, mean_and_error
from experiments.support.records import plain_options
from lightning_modules.launch.recipe import Recipe
from wherefrom.counterfactual.retraining import PIPELINE, RetrainedModels, RetrainingJob
from wherefrom.distillation.teacher_set import TeacherSet, read_teacher_set
from wherefrom.runtime.artifacts import Store, write_json

RESULT = Path("results/emoji/transfer.json")
RECIPE, FIRST = "configs/experiment/emoji_1k.yaml", "weights/emoji_1k"
BANK = "configs/attributor/influence_bank_quick.yaml"


def second_model(seed: int, store: Store) -> Path:
    """The pipeline of another seed, trained now if the store has none."""
    recipe = Recipe(RECIPE, store.root, train.main)
    latents = data_module(recipe.config["data"], store).train_latents
    models = RetrainedModels(store, recipe.identity(), latents.ids, latents.weighted_fingerprint, recipe.train)
    models.model(RetrainingJob((), seed))
    return store.root / "retrain" / models.name(RetrainingJob((), seed)) / PIPELINE


def curate(model: str | Path, experiment: str, output: Path, *more: str) -> TeacherSet:
    """The bank's rankings of all training images for a model's own images."""
    words = ("--model", str(model), "--teacher", BANK, "--output", str(output), *more)
    evaluate.main(["curate", "-c", f"configs/experiment/{experiment}.yaml", *words])
    return read_teacher_set(output)


def precisions(teacher: TeacherSet, cosines: Float[NDArray[np.float64], "q n"]) -> dict[str, list[float]]:
    """Each query's average precision, by k."""
    return average_precisions(matrix_of(teacher), cosines)


def main() -> None:
    """Trains, curates and measures what is missing, and prints the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the second model")
    parser.add_argument("--queries", type=int, nargs="+", default=[30, 90], help="of the second model to learn from")
    parser.add_argument("--steps", type=int, default=400, help="of a ranker's training, as in the table of rankers")
    parser.add_argument("--output", type=Path, default=Path("runs/transfer"))
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    second = second_model(options.seed, Store("cache"))
    everything = ("--nearest", "null", "--k", "null")
    bank = TRAIN.with_name(f"{TRAIN.name}_bank")
    curate(FIRST, "emoji_1k_teacher", bank, *everything)
    name = f"seed_{options.seed}"
    of_second = TRAIN.with_name(f"{TRAIN.name}_{name}")
    # A tenth is held out: what is curated must leave as many as the largest number.
    count = ("--captions.count", str(-(-10 * max(options.queries) // 9)))
    curate(second, "emoji_1k_teacher", of_second, *everything, *count)
    tests = [
        curate(model, "emoji_1k_teacher_test", options.output / f"test_{number}")
        for number, model in enumerate((Path(FIRST), second), start=1)
    ]
    assert tests[0].prompts == tests[1].prompts
    test = tests[1]

    def trained(title: str, variant: Variant) -> Path:
        place: Path = options.output / title
        if not (place / "ranker").exists():
            print(f"{title}: training", flush=True)
            train_one(variant, 0, place, options.steps)
        return place / "ranker"

    start = trained("first", Variant(teacher="bank"))
    of_first = "of the first model"
    rankers = {of_first: start}
    for queries in options.queries:
        own = {"data.init_args.queries": queries}
        warm = {**own, "model.init_args.init_from": str(start)}
        rankers[f"of the second, {queries} queries"] = trained(f"second_{queries}", Variant(options=own, teacher=name))
        rankers[f"of the second, {queries} queries, from the first's"] = trained(
            f"warm_{queries}", Variant(options=warm, teacher=name)
        )
    rows = {"untuned: minilm": precisions(test, cosines_of(Variant(("minilm",), None), test, None)[0])}
    rows |= {title: precisions(test, cosines_of(Variant(BOTH), test, folder)[0]) for title, folder in rankers.items()}
    rows["the first model's own rankings"] = precisions(test, matrix_of(tests[0]))
    # What a change of model costs: the same on the first model's own queries and rankings.
    for title, variant, folder in (
        ("untuned: minilm", Variant(("minilm",), None), None),
        (of_first, Variant(BOTH), start),
    ):
        rows[f"on the first model: {title}"] = precisions(tests[0], cosines_of(variant, tests[0], folder)[0])
    titles = ["ranking", *(f"mAP({k})" for k in rows["untuned: minilm"])]
    print("\n" + markdown_table(titles, [[title, *map(mean_and_error, row.values())] for title, row in rows.items()]))
    options_as_json = plain_options(vars(options))
    write_json(RESULT, {"command": "python -m experiments.transfer", **options_as_json, "rows": rows})


if __name__ == "__main__":
    main()
