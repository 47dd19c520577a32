"""Do cheap metrics predict the expensive one? Retrieval of the teacher's first images against retraining.

    python -m experiments.ranker_table --seeds 1
    python -m experiments.cheap_metrics

Takes rankers and untuned features of `results/emoji/ranker_table.json`, retrains emoji-1k without the `--k`
images that each names (all queries in one group, one seed), and correlates mAP(k) of the table with the increase of
the queries' losses, matched − mismatched. A ranker is one training run beside as many at random, and all of them are
measured on the same queries: the interval of each correlation is a bootstrap over these. What was trained is not
trained again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import spearmanr

import evaluate
from experiments.ranker_table import RESULT as TABLE
from experiments.ranker_table import Variant, place_of, train_one, variants
from experiments.support.arguments import script_parser
from wherefrom.counterfactual.results_file import COUNTERFACTUAL, read_results
from wherefrom.metrics.standard_error import estimate
from wherefrom.runtime.artifacts import write_json

RESULT = Path("results/emoji/cheap_metrics.json")
EVALUATION = "configs/experiment/emoji_1k_judge.yaml"
ENCODERS = {
    "efficientnet": {"class_path": "wherefrom.features.base.EfficientNetLite0Encoder"},
    "minilm": {"class_path": "wherefrom.features.base.MiniLMEncoder.from_pretrained"},
}
# The methods that search by features as they are.
UNTUNED = {"untuned: efficientnet": "efficientnet", "untuned: minilm": "caption"}
CHOSEN = ("bce", "1 encoder: efficientnet", "1 encoder: minilm", "no skip", "30 queries")
QUERY_GROUP, SAMPLES = 20, 2000  # all queries of the evaluation in one group


def method_file(name: str, variant: Variant, options: argparse.Namespace) -> Path:
    """The configuration of a line of the table as a method; its ranker is trained if the table did not leave it."""
    if name in UNTUNED:
        return Path("configs/attributor") / f"{UNTUNED[name]}.yaml"
    place = place_of(options.table, name, 0)
    if not (place / "ranker").exists():
        print(f"{name}: training", flush=True)
        train_one(variant, 0, place, options.steps)
    encoders = {each: ENCODERS[each] for each in variant.features}
    path: Path = options.output / f"{slug(name)}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    ranker = str((place / "ranker").resolve())
    write_json(path, {"class_path": "LearnedRanker", "init_args": {"ranker": ranker, "encoders": encoders}})
    return path


def slug(name: str) -> str:
    """A line's name as a method's."""
    return UNTUNED.get(name, "ranker_" + "".join(each if each.isalnum() else "_" for each in name))


def correlations(
    precisions: Float[NDArray[np.float64], "r q"], loss_increases: Float[NDArray[np.float64], "r p"], seed: int
) -> tuple[float, float, float]:
    """Spearman correlation over rankers of mean precision and mean loss increase; 95 % interval over queries."""

    def one(first: NDArray[np.intp], second: NDArray[np.intp]) -> float:
        result = spearmanr(precisions[:, first].mean(axis=1), loss_increases[:, second].mean(axis=1))
        return float(result.statistic)

    random = np.random.default_rng(seed)
    everywhere = (np.arange(precisions.shape[1]), np.arange(loss_increases.shape[1]))
    drawn = [one(*(random.choice(each, len(each)) for each in everywhere)) for _ in range(SAMPLES)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return one(*everywhere), float(low), float(high)


def loss_increases_of(result: Mapping[str, Any], method: str) -> list[float]:
    """Each query's loss increase when its own images were removed, less that of queries whose images stayed."""
    (row,) = (row for row in result["rows"] if row["method"] == method)
    return [a - b for a, b in zip(row["loss"]["matched"], row["loss"]["mismatched"], strict=True)]


def evaluated(files: Sequence[Path], k: int, output: Path) -> dict[str, Any]:
    """Counterfactual evaluation of the methods; the caption's ranking decides the query group, as everywhere."""
    words = {
        "methods": json.dumps(["configs/attributor/caption.yaml", *map(str, files)]),
        "settings": "{}",
        "protocol.ks": f"[{k}]",
        "protocol.query_groups": f"[{QUERY_GROUP}]",
        "protocol.seeds": "[0]",
        "protocol.random": "1",
        "workers.engine": "local",
        "output": str(output / "judge"),
    }
    evaluate.main(
        ["counterfactual", "-c", EVALUATION, *(word for name, text in words.items() for word in (f"--{name}", text))]
    )
    return read_results(output / "judge" / COUNTERFACTUAL)


def main() -> None:
    """Evaluates what was not evaluated yet, and prints."""
    parser = script_parser(__doc__)
    parser.add_argument("--variants", nargs="+", default=[*UNTUNED, *CHOSEN])
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="of a ranker's training, as in the table")
    parser.add_argument(
        "--table", type=Path, default=Path("runs/ranker_table"), help="where the table left its rankers"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/cheap_metrics"))
    options = parser.parse_args()
    if len(options.variants) < 3:
        raise SystemExit("A correlation over rankers needs at least three of them.")
    table = json.loads(TABLE.read_text())["rows"]
    chosen = {name: method_file(name, variants()[name], options) for name in options.variants}
    result = evaluated([file for file in chosen.values() if file.stem != "caption"], options.k, options.output)
    loss_increases = np.array([loss_increases_of(result, slug(name)) for name in chosen])
    depths = sorted(table[options.variants[0]]["0"]["ap"], key=int)
    collected: dict[str, Any] = {}
    print(f"\n| ranker | {' | '.join(f'mAP({depth})' for depth in depths)} | ΔL matched − mismatched |")
    print(f"|---{'|---' * (1 + len(depths))}|")
    for name, relative_loss_increase in zip(chosen, loss_increases, strict=True):
        cells = [table[name]["0"]["ap"][depth] for depth in depths] + [relative_loss_increase]
        print(f"| {name} | {' | '.join('{:.3f} ± {:.3f}'.format(*estimate(np.array(each))) for each in cells)} |")
    for depth in depths:
        precisions = np.array([table[name]["0"]["ap"][depth] for name in chosen])
        collected[depth] = correlations(precisions, loss_increases, seed=0)
        print("mAP({}) and ΔL: Spearman correlation {:.2f} ({:.2f} to {:.2f})".format(depth, *collected[depth]))
    write_json(
        RESULT,
        {
            "command": "python -m experiments.cheap_metrics",
            "k": options.k,
            "rises": dict(zip(chosen, loss_increases.tolist(), strict=True)),
            "spearman": collected,
        },
    )


if __name__ == "__main__":
    main()
