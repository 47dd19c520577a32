"""Where do the methods of a counterfactual evaluation put the two images that retraining feels most?

    python evaluate.py counterfactual -c configs/experiment/emoji_1k_judge.yaml
    python -m experiments.cross_style_counterparts
    python evaluate.py lds -c configs/experiment/emoji_1k_tuning.yaml
    python -m experiments.cross_style_counterparts --run runs/emoji_1k_tuning --results results/emoji/twins_tuning.json

Each query of emoji-1k was drawn with the caption of a training image, its *own*, or with a held-out one; its
*cross-style counterpart* is the same thing in the other style. Prints for each method of
that run how often it ranks each of the two
among the first `--k` and among the last `--k` of all training images, and among the first by the size of its
scores, whatever their sign; the record names each query's ranks, and calls a counterpart a twin, as it always did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float
from numpy.typing import NDArray

from experiments.support.arguments import script_parser
from experiments.support.data import data_module
from experiments.support.markdown import markdown_table
from wherefrom.counterfactual.results_file import COUNTERFACTUAL, DATAMODELING, read_results
from wherefrom.rankings.ranking_file import RANKING, order_of, read_ranking
from wherefrom.runtime.artifacts import Store, write_json

RESULT = Path("results/emoji/twins.json")
# What is ranked -> what the record calls it.
KINDS = {
    "own": "own",
    "counterpart": "twin",
    "own by size": "own by size",
    "counterpart by size": "twin by size",
}
ENDS = {kind: ("first",) if kind.endswith("size") else ("first", "last") for kind in KINDS}
STYLE = ", "  # what stands between the thing and its style in a caption


def own_and_counterpart(captions: Mapping[str, str], prompt: str) -> tuple[str | None, str | None]:
    """Ids of a prompt's own image and of the same thing in another style, where there are any.

    Args:
        captions: Id -> caption, of all training images.
        prompt: The prompt.
    """
    thing = prompt.rpartition(STYLE)[0]
    own = [name for name, caption in captions.items() if caption == prompt]
    other = [name for name, caption in captions.items() if caption.rpartition(STYLE)[0] == thing and caption != prompt]
    return min(own, default=None), min(other, default=None)


def ranks(ranking: Sequence[str], wanted: Sequence[str | None]) -> list[int | None]:
    """Places from 0 of these ids."""
    return [None if name is None else ranking.index(name) for name in wanted]


def by_size(ids: Sequence[str], scores: Float[NDArray[np.float64], " n"]) -> list[str]:
    """The ids by the size of their scores, the largest first."""
    return [ids[place] for place in order_of(ids, np.abs(scores))]


def shares(places: Sequence[int | None], count: int, k: int) -> dict[str, Any]:
    """How many of those that there are stand among the first k and the last k of so many."""
    there = [place for place in places if place is not None]
    return {"n": len(there), "first": sum(p < k for p in there), "last": sum(p >= count - k for p in there)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and writes the table."""
    made = script_parser(__doc__)
    made.add_argument(
        "--run", type=Path, default=Path("runs/emoji_1k_judge"), help="run folder of evaluate.py counterfactual or lds"
    )
    made.add_argument("--data", type=Path, default=Path("configs/data/emoji_1k.yaml"))
    made.add_argument("--k", type=int, default=5)
    made.add_argument("--store", type=Path, default=Path("cache"))
    made.add_argument("--results", type=Path, default=RESULT)
    asked = made.parse_args(arguments)
    result = next((asked.run / name for name in (COUNTERFACTUAL, DATAMODELING) if (asked.run / name).exists()), None)
    if result is None:
        raise SystemExit(
            f"{asked.run} holds neither {COUNTERFACTUAL} nor {DATAMODELING}: run evaluate.py, as above, first."
        )
    prompts = read_results(result, ("prompts",))["prompts"]
    images = data_module(yaml.safe_load(asked.data.read_text()), Store(asked.store)).train_images
    captions = {name: each[0] for name, each in zip(images.ids, images.captions, strict=True)}
    collected: dict[str, Any] = {}
    queries: list[str] = []
    for folder in sorted(path.parent for path in asked.run.glob(f"*/{RANKING}")):
        collected[folder.name] = {recorded: [] for recorded in KINDS.values()}
        rankings = sorted(read_ranking(folder).items())
        queries = [prompts[query] for query, _ in rankings]  # the same of every method
        for query, (ids, scores) in rankings:
            pair = own_and_counterpart(captions, prompts[query])
            places = (*ranks(ids, pair), *ranks(by_size(ids, scores), pair))
            for recorded, place in zip(KINDS.values(), places, strict=True):
                collected[folder.name][recorded].append(place)
    titles = [f"{kind}: {end} {asked.k}" for kind in KINDS for end in ENDS[kind]]
    rows = []
    for method, each in collected.items():
        cells = {kind: shares(each[recorded], len(captions), asked.k) for kind, recorded in KINDS.items()}
        rows.append([method, *(f"{cells[kind][end]} of {cells[kind]['n']}" for kind in KINDS for end in ENDS[kind])])
    print(markdown_table(["method", *titles], rows))
    write_json(
        asked.results, {"k": asked.k, "training_pictures": len(captions), "queries": queries, "ranks": collected}
    )


if __name__ == "__main__":
    main()
