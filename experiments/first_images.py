"""How much of a method's linear datamodeling score do its first images of each query make?

    python -m experiments.first_images

Nothing is trained: losses of the 32 models of random training subsets come from `results/emoji/retrains.parquet`,
scores from `results/emoji/judge`. For every method kept there, Spearman correlation (mean over the 20 queries,
standard error) between each query's losses and the sums of the scores of what the models saw

* with all scores;
* with only the first image's, the first two's, … (all other scores set to 0);
* with all but the first two's, *beyond* those two: losses and sums, both less what a linear regression on the presence
  of these two images explains (a partial correlation), for the method's own first two and for AbU+'s. The last line
  says what other seeds of the same subsets reach, with and without the same control: how much there is to predict.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.stats import spearmanr

from experiments.support.data import data_module
from wherefrom.counterfactual.datamodeling_experiment import RandomSubsets
from wherefrom.metrics.standard_error import estimate
from wherefrom.runtime.artifacts import Store, identity_hash, write_json

RESULT = Path("results/emoji/first_images.json")
KEPT = Path("results/emoji/judge")
PARTIAL = ("abu_plus_rerank",)  # scores a tenth of the images; what stands for the others does not add up
CONTROLLED = 2
CUTS = (1, 2, 5, 20)
COLUMNS = ("all", *(f"first {k}" for k in CUTS), "beyond its first two", "beyond AbU+'s first two")


def beyond(
    a: Float[NDArray[np.float64], " m"], b: Float[NDArray[np.float64], " m"], given: Float[NDArray[np.float64], "m c"]
) -> float:
    """Spearman correlation of a and b, less what a linear regression of either on the given columns explains."""
    design = np.column_stack([np.ones(len(a)), given])
    left, right = (values - design @ np.linalg.lstsq(design, values, rcond=None)[0] for values in (a, b))
    return float(spearmanr(left, right).statistic)


def cut(
    scores: Float[NDArray[np.float64], " n"], first: Int[NDArray[np.int64], " k"]
) -> Float[NDArray[np.float64], " n"]:
    """The scores of the named places; 0 elsewhere."""
    result = np.zeros_like(scores)
    result[first] = scores[first]
    return result


def subset_losses(
    ids: Sequence[str], subsets: Bool[NDArray[np.bool_], "m n"], queries: Sequence[str], seed: int
) -> Float[NDArray[np.float64], "q m"]:
    """Each query's loss under the model of each subset, from the committed table.

    Raises:
        SystemExit: The table does not hold one of the models.
    """
    identity = json.loads(Path("weights/emoji_1k/manifest.json").read_text())["identity"]
    table = pq.read_table("results/emoji/retrains.parquet", columns=["retrain", "query", "loss"]).to_pylist()
    loss = {(row["retrain"], row["query"]): row["loss"] for row in table}
    result = np.empty((len(queries), len(subsets)))
    for row, seen in enumerate(subsets):
        excluded = sorted(name for name, there in zip(ids, seen, strict=True) if not there)
        parts = {"excluded": identity_hash({"ids": excluded}), "excluded_count": len(excluded), "seed": seed}
        name = identity_hash({**identity, **parts})
        for column, query in enumerate(queries):
            if (name, query) not in loss:
                raise SystemExit(f"results/emoji/retrains.parquet does not hold subset {row} of seed {seed}.")
            result[column, row] = loss[name, query]
    return result


def of_method(
    scores: Float[NDArray[np.float64], "q n"],
    subsets: Bool[NDArray[np.bool_], "m n"],
    losses: Float[NDArray[np.float64], "q m"],
    leading: Int[NDArray[np.int64], "q c"],
) -> dict[str, list[float]]:
    """Each query's correlations for one method.

    Args:
        scores: The method's scores.
        subsets: The images that each model was trained on.
        losses: The queries' losses under each model.
        leading: AbU+'s first images of each query.
    """
    found: dict[str, list[float]] = {name: [] for name in COLUMNS}
    seen: Any = subsets.astype(np.float64)
    for each, loss, theirs in zip(scores, losses, leading, strict=True):
        order = np.argsort(-each, kind="stable")
        found["all"].append(float(spearmanr(seen @ each, -loss).statistic))
        for k in CUTS:
            found[f"first {k}"].append(float(spearmanr(seen @ cut(each, order[:k]), -loss).statistic))
        for name, places in (("beyond its first two", order[:CONTROLLED]), ("beyond AbU+'s first two", theirs)):
            rest = each.copy()
            rest[places] = 0
            found[name].append(beyond(seen @ rest, -loss, seen[:, places]))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and writes the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--store", type=Path, default=Path("cache"))
    made.add_argument("--results", type=Path, default=RESULT)
    asked = made.parse_args(arguments)
    images = data_module(
        yaml.safe_load(Path("configs/data/emoji_1k.yaml").read_text()), Store(asked.store)
    ).train_images
    record = json.loads((KEPT / "lds.json").read_text())
    queries: list[str] = record["queries"]
    settings = record.get("random_subsets") or record["halves"]  # the committed record has the earlier name
    design = RandomSubsets(**{**settings, "further_seeds": tuple(settings["further_seeds"])})
    subsets = design.masks(images.ids)
    losses = subset_losses(images.ids, subsets, queries, design.seed)
    kept: dict[str, Float[NDArray[np.float64], "q n"]] = {}
    for folder in sorted(path.parent for path in KEPT.glob("*/scores")):
        if folder.name not in PARTIAL:
            files = [folder / "scores" / f"{identity_hash({'query': query})}.safetensors" for query in queries]
            kept[folder.name] = np.stack([load_file(file)["scores"].astype(np.float64) for file in files])
    leading = np.argsort(-kept["abu_plus"], axis=1, kind="stable")[:, :CONTROLLED]
    table: dict[str, Any] = {name: of_method(scores, subsets, losses, leading) for name, scores in kept.items()}
    few = subsets[: design.repeated]
    again = np.mean([subset_losses(images.ids, few, queries, seed) for seed in design.further_seeds], axis=0)
    pairs = list(zip(losses[:, : design.repeated], again, leading, strict=True))
    table["another seed"] = {
        "all": [float(spearmanr(a, b).statistic) for a, b, _ in pairs],
        COLUMNS[-1]: [beyond(a, b, few[:, places].astype(np.float64)) for a, b, places in pairs],
    }
    print(f"| method | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for method, found in table.items():
        cells = ["{:.3f} ± {:.3f}".format(*estimate(np.array(found[c]))) if c in found else "" for c in COLUMNS]
        print(f"| {method} | {' | '.join(cells)} |")
    write_json(asked.results, {"queries": queries, "controlled": CONTROLLED, "methods": table})


if __name__ == "__main__":
    main()
