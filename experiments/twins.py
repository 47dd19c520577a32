"""Where do the judge's methods put the two images that retraining feels most?

    python evaluate.py counterfactual -c configs/experiment/emoji_1k_judge.yaml
    python -m experiments.twins
    python evaluate.py lds -c configs/experiment/emoji_1k_tuning.yaml
    python -m experiments.twins --run runs/emoji_1k_tuning --results results/emoji/twins_tuning.json

Each query of emoji-1k was drawn with the caption of a training image, its *own*, or with a held-out one; its *twin*
is the same thing in the other style. Prints for each method of the judge's run how often it ranks each of the two
among the first `--k` and among the last `--k` of all training images, and among the first by the size of its
scores, whatever their sign; the record names each query's ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experiments.near_duplicates import data_module
from wherefrom.counterfactual.results_file import COUNTERFACTUAL, DATAMODELING, read_results
from wherefrom.rankings.ranking_file import RANKING, order_of, read_ranking
from wherefrom.runtime.artifacts import Store, write_json

RESULT = Path("results/emoji/twins.json")
KINDS = ("own", "twin", "own by size", "twin by size")
ENDS = {kind: ("first",) if kind.endswith("size") else ("first", "last") for kind in KINDS}
STYLE = ", "  # what stands between the thing and its style in a caption


def twins(captions: Mapping[str, str], prompt: str) -> tuple[str | None, str | None]:
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


def by_size(ids: Sequence[str], scores: Sequence[float]) -> list[str]:
    """The ids by the size of their scores, the largest first."""
    return [ids[place] for place in order_of(ids, np.abs(scores))]


def shares(places: Sequence[int | None], count: int, k: int) -> dict[str, Any]:
    """How many of those that there are stand among the first k and the last k of so many."""
    there = [place for place in places if place is not None]
    return {"n": len(there), "first": sum(p < k for p in there), "last": sum(p >= count - k for p in there)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and writes the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--run", type=Path, default=Path("runs/emoji_1k_judge"), help="run folder of the judge or of lds")
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
        collected[folder.name] = {kind: [] for kind in KINDS}
        rankings = sorted(read_ranking(folder).items())
        queries = [prompts[query] for query, _ in rankings]  # the same of every method
        for query, (ids, scores) in rankings:
            pair = twins(captions, prompts[query])
            places = (*ranks(ids, pair), *ranks(by_size(ids, scores), pair))
            for kind, place in zip(KINDS, places, strict=True):
                collected[folder.name][kind].append(place)
    titles = [f"{kind}: {end} {asked.k}" for kind in KINDS for end in ENDS[kind]]
    print(f"| method | {' | '.join(titles)} |")
    print("|---" * (len(titles) + 1) + "|")
    for method, each in collected.items():
        cells = {kind: shares(places, len(captions), asked.k) for kind, places in each.items()}
        texts = [f"{cells[kind][end]} of {cells[kind]['n']}" for kind in KINDS for end in ENDS[kind]]
        print(f"| {method} | {' | '.join(texts)} |")
    write_json(
        asked.results, {"k": asked.k, "training_pictures": len(captions), "queries": queries, "ranks": collected}
    )


if __name__ == "__main__":
    main()
