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

from wherefrom.attributors.base import Say, Scores, silent
from wherefrom.evaluation.metrics import LinearDatamodelingScore
from wherefrom.keyed import hash_text
from wherefrom.retraining import Measurements, Panel, Retrain, Retrains, measure_retrain
from wherefrom.storage import write_json

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
        """Which pictures each model sees, by hash."""
        size, found = round(self.share * len(ids)), np.zeros((self.count, len(ids)), dtype=bool)
        for index in range(self.count):
            keys = [hash_text(f"half/{self.seed}/{index}/{name}") for name in ids]
            found[index, np.argsort(keys, kind="stable")[:size]] = True
        return found


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
    """

    method: str
    mean: float
    error: float
    low: float
    high: float
    count: int


def linear_datamodeling_scores(
    folder: Path,
    rankings: Mapping[str, Sequence[Scores]],
    retrains: Retrains,
    panel: Panel,
    table: Measurements,
    halves: Halves,
    device: torch.device,
    say: Say = silent,
) -> list[Score]:
    """Trains on random halves and correlates, for each query, losses with sums of scores.

    Args:
        folder: Where `lds.json` goes.
        rankings: Method -> scores of all queries.
        retrains: Trains, or finds what was trained.
        panel: The queries.
        table: Where measurements are kept.
        halves: Which models are trained.
        device: Where the models are measured.
        say: Is told what is being done.

    Raises:
        ValueError: A training failed, or a method did not score all training pictures; what is finished is kept.
        StorageError: A file could not be written.
    """
    ids = retrains.data.ids
    for method, results in rankings.items():
        cut = [scores.query.id for scores in results if set(scores.ids) != set(ids)]
        if cut:
            raise ValueError(
                f"{method} did not score all training pictures for query {cut[0]!r}: its sums mean nothing."
            )
    subsets = halves.subsets(ids)
    queries = [query.id for query in panel.queries]

    def losses(rows: Sequence[int], seed: int) -> Float[NDArray[np.float64], "q m"]:
        found = []
        for row in rows:
            retrain = Retrain(tuple(name for name, seen in zip(ids, subsets[row], strict=True) if not seen), seed)
            say(f"half {row + 1} of {halves.count}, seed {seed}")
            measured = measure_retrain(retrains, retrain, panel, table, device)
            found.append([measured[query].loss for query in queries])
        return np.array(found).T

    whole = losses(range(halves.count), halves.seed)
    found = []
    for method, results in rankings.items():
        by_query = {scores.query.id: dict(zip(scores.ids, scores.scores, strict=True)) for scores in results}
        values = torch.tensor([[by_query[query][name] for name in ids] for query in queries], dtype=torch.float64)
        metric = LinearDatamodelingScore()
        metric.update(values, torch.from_numpy(subsets), torch.from_numpy(whole))
        found.append(_score(method, torch.cat([each.flatten() for each in metric.values])))
    if halves.repeated >= 3 and halves.further_seeds:
        again = np.mean([losses(range(halves.repeated), seed) for seed in halves.further_seeds], axis=0)
        pairs = zip(whole[:, : halves.repeated], again, strict=True)
        found.append(_score("another seed", torch.tensor([float(spearmanr(a, b).statistic) for a, b in pairs])))
    write_json(folder / RESULT, {"halves": vars(halves), "queries": queries, "rows": [vars(score) for score in found]})
    return found


def _score(method: str, values: Float[Tensor, "q"]) -> Score:
    """The values' mean, and how sure it is."""
    numbers = values.double().numpy()
    drawn = np.random.default_rng(0).choice(numbers, (_DRAWS, len(numbers))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    error = float(numbers.std(ddof=1) / np.sqrt(len(numbers))) if len(numbers) > 1 else float("nan")
    return Score(method, float(numbers.mean()), error, float(low), float(high), len(numbers))


def as_table(scores: Sequence[Score]) -> str:
    """The table in Markdown."""
    lines = ["| method | Spearman | 95 % interval | n |", "|---|---|---|---|"]
    lines += [
        f"| {each.method} | {each.mean:.3f} ± {each.error:.3f} | {each.low:.3f} to {each.high:.3f} | {each.count} |"
        for each in scores
    ]
    return "\n".join(lines)
