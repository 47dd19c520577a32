"""Linear datamodeling score: do sums of scores foretell the losses of models trained on random halves of the data?

Park et al. 2023 (TRAK), section 2.2. It assumes that scores add up, which unlearning and feature methods do not
promise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from wherefrom.counterfactual.effects import or_none
from wherefrom.counterfactual.retraining import Retrain
from wherefrom.counterfactual.sweep import Sweep
from wherefrom.metrics.linear_datamodeling import LinearDatamodelingScore
from wherefrom.metrics.standard_error import estimate
from wherefrom.queries.types import Scores
from wherefrom.runtime.artifacts import write_json
from wherefrom.runtime.keyed_random import hash_text

RESULT = "lds.json"
_DRAWS = 1000


@dataclass(frozen=True)
class Halves:
    """Which models are trained.

    Attributes:
        count: Number of random halves.
        share: Share of the training set that each model sees.
        seed: Seed of the halves, and of their trainings.
        repeated: How many of the halves are trained with further seeds also: the ceiling.
        further_seeds: Those seeds.
    """

    count: int = 32
    share: float = 0.5
    seed: int = 0
    repeated: int = 8
    further_seeds: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.count < 3 or not 0 < self.share < 1 or not 0 <= self.repeated <= self.count:
            raise ValueError(
                "A linear datamodeling score needs at least 3 subsets, a share between 0 and 1, and no more repeated "
                f"subsets than there are; given count {self.count}, share {self.share}, repeated {self.repeated}."
            )

    def subsets(self, ids: Sequence[str]) -> Bool[NDArray[np.bool_], "m n"]:
        """Which images each model sees, by hash."""
        size, result = round(self.share * len(ids)), np.zeros((self.count, len(ids)), dtype=bool)
        for index in range(self.count):
            keys = [hash_text(f"half/{self.seed}/{index}/{name}") for name in ids]
            result[index, np.argsort(keys, kind="stable")[:size]] = True
        return result


@dataclass(frozen=True)
class Score:
    """One line of the table.

    Attributes:
        method: The method, or `another seed` for the ceiling.
        mean: Mean Spearman correlation over queries.
        error: Its standard error.
        low: Lower end of its 95 % bootstrap interval over queries.
        high: Upper end.
        count: Queries.
        values: Correlation of each query, in the order of `lds.json`'s queries; None where one side is constant.
    """

    method: str
    mean: float
    error: float
    low: float
    high: float
    count: int
    values: tuple[float | None, ...]


def linear_datamodeling_scores(
    folder: Path,
    rankings: Mapping[str, Sequence[Scores]],
    sweep: Sweep,
    halves: Halves,
) -> list[Score]:
    """Trains on random halves and correlates, for each query, losses with sums of scores.

    Args:
        folder: Where `lds.json` goes.
        rankings: Method -> scores of all queries.
        sweep: Trains the models and measures the queries on them.
        halves: Which models are trained.

    Raises:
        ValueError: A training failed, or a method did not score all training images; what is finished is kept.
        StorageError: A file could not be written.
    """
    ids = sweep.retrains.ids
    for method, results in rankings.items():
        cut = [scores.query.id for scores in results if set(scores.ids) != set(ids)]
        if cut:
            raise ValueError(f"{method} did not score all training images for query {cut[0]!r}: its sums mean nothing.")
    subsets = halves.subsets(ids)
    queries = [scores.query.id for scores in next(iter(rankings.values()))]
    seeds = halves.further_seeds if halves.repeated >= 3 else ()

    def model(row: int, seed: int) -> Retrain:
        return Retrain(tuple(name for name, seen in zip(ids, subsets[row], strict=True) if not seen), seed)

    wanted = [model(row, halves.seed) for row in range(halves.count)]
    wanted += [model(row, seed) for seed in seeds for row in range(halves.repeated)]
    measured = sweep.measure(wanted)

    def losses(count: int, seed: int) -> Float[NDArray[np.float64], "q m"]:
        return np.array([[measured[model(row, seed)][query].loss for row in range(count)] for query in queries])

    whole = losses(halves.count, halves.seed)
    collected = []
    for method, results in rankings.items():
        by_query = {scores.query.id: dict(zip(scores.ids, scores.scores, strict=True)) for scores in results}
        values = torch.tensor([[by_query[query][name] for name in ids] for query in queries], dtype=torch.float64)
        metric = LinearDatamodelingScore()
        metric.update(values, torch.from_numpy(subsets), torch.from_numpy(whole))
        collected.append(_score(method, torch.cat([each.flatten() for each in metric.values])))
    if seeds:
        again = np.mean([losses(halves.repeated, seed) for seed in seeds], axis=0)
        pairs = zip(whole[:, : halves.repeated], again, strict=True)
        collected.append(_score("another seed", torch.tensor([float(spearmanr(a, b).statistic) for a, b in pairs])))
    prompts = {query.id: query.prompt for query in sweep.panel.queries}
    result = {
        "halves": vars(halves),
        "queries": queries,
        "prompts": prompts,
        "rows": [vars(score) for score in collected],
    }
    write_json(folder / RESULT, result)
    return collected


def _score(method: str, values: Float[Tensor, " q"]) -> Score:
    """The values' mean, and how sure it is."""
    numbers = values.double().numpy()
    drawn = np.random.default_rng(0).choice(numbers, (_DRAWS, len(numbers))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Score(method, *estimate(numbers), float(low), float(high), len(numbers), tuple(or_none(numbers)))


def as_table(scores: Sequence[Score]) -> str:
    """The table in Markdown."""
    lines = ["| method | Spearman | 95 % interval | n |", "|---|---|---|---|"]
    lines += [
        f"| {each.method} | {each.mean:.3f} ± {each.error:.3f} | {each.low:.3f} to {each.high:.3f} | {each.count} |"
        for each in scores
    ]
    return "\n".join(lines)
