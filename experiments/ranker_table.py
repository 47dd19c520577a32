"""How well embeddings find what a teacher ranks highest: untuned features, and rankers of every kind.

    python -m experiments.ranker_table
    python -m experiments.ranker_table --variants bce "1 encoder: efficientnet" --seeds 1

Trains `configs/experiment/emoji_ranker.yaml` once for each variant and seed on the teacher set in
`runs/emoji_1k_teacher` (AbU+ among the images that the bank chooses), and measures mAP(k) over the whole training set
for the queries in `runs/emoji_1k_teacher_test`, none of which was trained on. Errors are standard errors over queries
of the mean over seeds. *Without* a half of the features is mAP where that half is another image's: one whose loss
costs nothing is ignored. *Against* the best untuned features, errors are of the differences, query by query.

A variant that was measured before is not trained again. Other teachers' sets are named
`runs/emoji_1k_teacher_NAME`, as `configs/experiment/emoji_1k_teacher.yaml` says; a variant whose set is missing is
skipped, and says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch.nn import functional as F

import train
from experiments.support.arguments import script_parser
from experiments.support.records import experiment_identity, read_record, recorded_experiment
from wherefrom.commands.evaluate_retrieval import DEPTHS
from wherefrom.distillation.embedding_similarity import similarities
from wherefrom.distillation.feature_ablation import ablate_features
from wherefrom.distillation.losses import Ordinal, Regression, SquaredError
from wherefrom.distillation.ranker import load_ranker
from wherefrom.distillation.teacher_set import QUERIES, TeacherSet, read_teacher_set
from wherefrom.metrics.retrieval import Cutoff, MeanAveragePrecision, top_of
from wherefrom.metrics.standard_error import estimate
from wherefrom.runtime.artifacts import hash_file, identity_hash, write_json

EXPERIMENT, RESULT = "configs/experiment/emoji_ranker.yaml", Path("results/emoji/ranker_table.json")
TRAIN, TEST = Path("runs/emoji_1k_teacher"), Path("runs/emoji_1k_teacher_test")
BOTH = ("efficientnet", "minilm")
CANDIDATES = 0.1  # K, as a share of the training images
REFERENCE = "untuned: minilm"  # the best of the untuned
RATE = "model.init_args.optimizer.init_args.lr"


@dataclass(frozen=True)
class Variant:
    """One line of the table: a ranker, or untuned features.

    Attributes:
        features: Encoders whose features are put side by side.
        options: What differs from the experiment; None leaves the features untuned.
        teacher: Which teacher set it learns from; "" is AbU+ among those that the bank chooses.
    """

    features: tuple[str, ...] = BOTH
    options: dict[str, Any] | None = field(default_factory=dict)
    teacher: str = ""


def variants() -> dict[str, Variant]:
    """All lines."""
    ranker = "model.init_args.ranker.init_args"
    own_rate = {"model.init_args.scale_lr": None}
    result = {
        "untuned: efficientnet": Variant(("efficientnet",), None),
        "untuned: minilm": Variant(("minilm",), None),
        "untuned: both": Variant(BOTH, None),
        "bce": Variant(),
        "1 encoder: efficientnet": Variant(("efficientnet",)),
        "1 encoder: minilm": Variant(("minilm",)),
        "features as they are": Variant(options={f"{ranker}.parts": []}),
        "no skip": Variant(options={f"{ranker}.skip": False, RATE: 1e-4}),
        "scale from -1": Variant(options={"model.init_args.scale": -1.0, **own_rate}),
        "all as published": Variant(
            options={
                f"{ranker}.parts": [],
                f"{ranker}.skip": False,
                RATE: 1e-3,
                "model.init_args.scale": 1.0,
                **own_rate,
            }
        ),
    }
    for loss in (SquaredError, Ordinal, Regression):
        result[f"loss: {loss.__name__}"] = Variant(
            options={"model.init_args.loss": f"{loss.__module__}.{loss.__name__}"}
        )
    for share in (0.0, 0.1, 0.2, 0.8):
        result[f"outside {share:g}"] = Variant(options={"data.init_args.outside": share})
    for outputs in (64, 128, 256):
        result[f"{outputs} outputs"] = Variant(options={f"{ranker}.outputs": outputs})
    # What weights/emoji_1k_ranker is: small enough to be kept with the code.
    small = {"width": 256, "hidden": 1, "outputs": 384}
    result["1 encoder: minilm, small"] = Variant(
        ("minilm",), {f"{ranker}.{size}": number for size, number in small.items()}
    )
    for queries in (30, 75, 150):
        result[f"{queries} queries"] = Variant(options={"data.init_args.queries": queries})
    for teacher in ("looks", "bank", "corrected", "trak", "ensemble"):
        result[f"teacher: {teacher}"] = Variant(teacher=teacher)
    return result


def folder_of(variant: Variant) -> Path:
    """The teacher set that a variant learns from."""
    return TRAIN.with_name(f"{TRAIN.name}_{variant.teacher}") if variant.teacher else TRAIN


def teacher_hash(variant: Variant) -> str:
    """Says which rankings a variant learns from: another set of the same name makes another ranker."""
    return hash_file(folder_of(variant) / QUERIES)


def place_of(output: Path, name: str, seed: int) -> Path:
    """Where a variant of a seed is trained; its ranker is in `ranker`."""
    return output / identity_hash({"variant": name, "seed": seed})


def written(value: Any) -> str:
    """As the command line reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def train_one(variant: Variant, seed: int, folder: Path, steps: int) -> None:
    """Trains a variant's ranker into the folder."""
    assert variant.options is not None
    features = read_teacher_set(folder_of(variant), variant.features).features
    widths = [features[name].training.shape[1] for name in variant.features]
    options = {
        "seed_everything": seed,
        "data.init_args.folder": str(folder_of(variant)),
        "data.init_args.features": list(variant.features),
        "data.init_args.seed": seed,
        "data.init_args.first": round(CANDIDATES * len(read_teacher_set(folder_of(variant), []).images)),
        "model.init_args.ranker.init_args.inputs": sum(widths),
        "model.init_args.ranker.init_args.parts": widths,
        "model.init_args.save_to": str(folder / "ranker"),
        "trainer.default_root_dir": str(folder),
        "trainer.max_steps": steps,
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        "trainer.callbacks": [{"class_path": "RetrievalMetrics", "init_args": {"k": [4, 9, 34]}}],
        "trainer.logger": [
            {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}}
        ],
        **variant.options,
    }
    train.main(
        ["fit", "-c", EXPERIMENT, *(word for name, value in options.items() for word in (f"--{name}", written(value)))]
    )


def cosines_of(
    variant: Variant, test: TeacherSet, folder: Path | None
) -> tuple[Float[NDArray[np.float64], "q n"], int, float]:
    """Cosines of the test queries with all training images, width of the vectors, milliseconds of a query."""
    both = test.concatenated(variant.features)
    if folder is None:
        # Each encoder's vectors at length one, so that none drowns the others.
        parts = [test.features[name] for name in variant.features]
        vectors = [
            torch.cat([F.normalize(torch.from_numpy(np.array(side)), dim=1) for side in sides], dim=1)
            for sides in ([part.queries for part in parts], [part.training for part in parts])
        ]
        queries, training = (F.normalize(each, dim=1) for each in vectors)
        started = time.perf_counter()
        result = (queries @ training.T).double().numpy()
        return result, training.shape[1], 1000 * (time.perf_counter() - started) / len(queries)
    ranker, _ = load_ranker(folder)
    result = similarities(ranker, both)
    images = ranker.embed(torch.from_numpy(np.array(both.training)))
    started = time.perf_counter()
    for query in torch.from_numpy(np.array(both.queries)):
        ranker.embed(query[None]) @ images.T
    return result, int(ranker.sizes["outputs"]), 1000 * (time.perf_counter() - started) / len(both.queries)


def matrix_of(test: TeacherSet) -> Float[NDArray[np.float64], "q n"]:
    """Scores of a set that ranks all training images, in their order.

    Raises:
        ValueError: It ranks only some of them.
    """
    if not test.is_complete:
        raise ValueError(f"A query has {test.rows.shape[1]} scores, but there are {len(test.images)} training images.")
    return test.by_image()


def average_precisions(
    teacher: Float[NDArray[np.float64], "q n"], cosines: Float[NDArray[np.float64], "q n"]
) -> dict[str, list[float]]:
    """Each query's average precision, by k."""
    result = {}
    for share in DEPTHS:
        depth = Cutoff.of(share, teacher.shape[1])
        metric = MeanAveragePrecision()
        metric.update(torch.from_numpy(cosines), top_of(torch.from_numpy(teacher), depth.number))
        result[str(depth.number)] = torch.cat(metric.values).tolist()
    return result


def measure(name: str, variant: Variant, seed: int, test: TeacherSet, options: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one variant with one seed."""
    folder = None
    record: dict[str, Any] = {}
    if variant.options is not None:
        place = place_of(options.output, name, seed)
        shutil.rmtree(place, ignore_errors=True)
        started = time.monotonic()
        record["teacher"] = teacher_hash(variant)
        train_one(variant, seed, place, options.steps)
        folder, record["train_s"] = place / "ranker", time.monotonic() - started
        ranker, features = load_ranker(folder)
        record["scale"] = float(ranker.scale.detach())
        if len(features) == 2:
            widths = {each: test.features[each].training.shape[1] for each in features}
            record["alone"] = {
                f"without {half}": result.mean
                for half, result in ablate_features(test, ranker=ranker, features=features, widths=widths).items()
                if half != "nothing"
            }
    cosines, width, milliseconds = cosines_of(variant, test, folder)
    record |= {"ap": average_precisions(matrix_of(test), cosines), "width": width, "ms": milliseconds}
    return record


def line(
    name: str, records: Sequence[dict[str, Any]], ks: Sequence[int], count: int, reference: dict[str, list[float]]
) -> str:
    """A row of the table; differences are of the same queries' average precisions."""
    means = {str(k): np.mean([record["ap"][str(k)] for record in records], axis=0) for k in ks}
    cells = ["{:.3f} ± {:.3f}".format(*estimate(result)) for result in means.values()]
    cells += ["{:+.3f} ± {:.3f}".format(*estimate(result - np.array(reference[k]))) for k, result in means.items()]
    alone = records[0].get("alone", {})
    cells += [f"{np.mean([record['alone'][half] for record in records]):.3f}" for half in alone] or ["–", "–"]
    milliseconds = float(np.mean([record["ms"] for record in records]))
    return (
        f"| {name} | {' | '.join(cells)} | {milliseconds:.2f} | {4 * records[0]['width'] * count:,} | {len(records)} |"
    )


def kept_rows(stored: Mapping[str, Any], made_of: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a record, if it is of the same steps, test queries and experiment."""
    before = dict(stored.get("made_of", {}))
    before["experiment"] = recorded_experiment(before.get("experiment", ""))
    return dict(stored["rows"]) if before == made_of else {}


def main() -> None:
    """Trains what is missing and prints the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--variants", nargs="+", default=list(variants()))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("runs/ranker_table"))
    options = parser.parse_args()
    test = read_teacher_set(TEST)
    made_of = {
        "steps": options.steps,
        "test": hash_file(TEST / QUERIES),
        "experiment": experiment_identity(Path(EXPERIMENT)),
    }
    rows = kept_rows(read_record(RESULT), made_of)
    skipped = []
    for name in dict.fromkeys([REFERENCE, *options.variants]):
        variant = variants()[name]
        if variant.options is not None and not (folder_of(variant) / QUERIES).exists():
            skipped.append(f"{name} is skipped: there is no teacher set in {folder_of(variant)}")
            continue
        kept = rows.setdefault(name, {})
        if variant.options is not None and any(row["teacher"] != teacher_hash(variant) for row in kept.values()):
            kept.clear()
        for seed in range(options.seeds if variant.options is not None else 1):
            if str(seed) not in kept:
                print(f"{name}, seed {seed}", flush=True)
                kept[str(seed)] = measure(name, variant, seed, test, options)
                write_json(
                    RESULT,
                    {
                        "command": "python -m experiments.ranker_table",
                        "made_of": made_of,
                        "training_pictures": len(test.images),
                        "queries": len(test.queries),
                        "rows": rows,
                    },
                )
    ks = [Cutoff.of(share, len(test.images)).number for share in DEPTHS]
    titles = [
        *(f"mAP({k})" for k in ks),
        *(f"mAP({k}) against {REFERENCE}" for k in ks),
        f"mAP({ks[1]}) without {BOTH[0]}",
        f"without {BOTH[1]}",
        "ms",
        "bytes",
        "seeds",
    ]
    print(f"\n| embedding | {' | '.join(titles)} |\n|---{'|---' * len(titles)}|")
    for name in options.variants:
        if rows.get(name):
            print(line(name, list(rows[name].values()), ks, len(test.images), rows[REFERENCE]["0"]["ap"]))
    print("\n".join(["", *skipped, f"{len(test.queries)} queries, {len(test.images):,} training images"]))


if __name__ == "__main__":
    main()
