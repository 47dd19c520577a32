"""Linear datamodeling score (LDS) of attribution methods: models are trained on random subsets of the data.

Park et al. 2023 (TRAK), section 2.2: the Spearman correlation, over the subsets, of minus a query's loss with the sum
of the scores of the images that the model saw. It assumes that scores add up, which unlearning and feature methods do
not promise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.counterfactual.results_file import DATAMODELING, or_none
from wherefrom.counterfactual.retraining import RetrainingJob
from wherefrom.counterfactual.sweep import Sweep
from wherefrom.metrics.linear_datamodeling import LinearDatamodelingScore
from wherefrom.metrics.rank_correlation import spearman
from wherefrom.metrics.standard_error import estimate
from wherefrom.metrics.ties import EQUAL
from wherefrom.queries.types import Scores
from wherefrom.runtime.artifacts import write_json
from wherefrom.runtime.keyed_random import hash_text

CEILING = "another seed"  # the row of the same subsets trained with further seeds
_BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class RandomSubsets:
    """Random subsets of the training set, and the models that are trained on them.

    Attributes:
        count: Number of random subsets.
        share: Share of the training set that each model sees.
        seed: Seed of the subsets, and of their trainings.
        repeated: How many of the subsets are trained with further seeds also: the ceiling.
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

    def masks(self, ids: Sequence[str]) -> Bool[NDArray[np.bool_], "m n"]:
        """Which images each model sees, by hash.

        Args:
            ids: Ids of the training set; their order does not matter.
        """
        size, result = round(self.share * len(ids)), np.zeros((self.count, len(ids)), dtype=bool)
        for index in range(self.count):
            # The salt decides which images a model is trained on, so it never changes.
            keys = [hash_text(f"half/{self.seed}/{index}/{name}") for name in ids]
            result[index, np.argsort(keys, kind="stable")[:size]] = True
        return result


@dataclass(frozen=True)
class DatamodelingRow:
    """Linear datamodeling score of one method.

    Attributes:
        method: The method, or `another seed` for the ceiling: the correlation of the losses of two trainings.
        mean: Mean Spearman correlation over the queries that have one; None where none has.
        error: Its standard error.
        low: Lower end of its 95 % bootstrap interval over queries.
        high: Upper end.
        count: Queries that have one.
        values: Correlation of each query, in the order of `lds.json`'s queries; None where one side is constant as far
            as rounding can tell, so that there is none.
        undefined: Queries without a correlation.
    """

    method: str
    mean: float | None
    error: float | None
    low: float | None
    high: float | None
    count: int
    values: tuple[float | None, ...]
    undefined: int = 0


def linear_datamodeling_score(
    folder: Path,
    rankings: Mapping[str, Sequence[Scores]],
    sweep: Sweep,
    random_subsets: RandomSubsets = RandomSubsets(),
) -> list[DatamodelingRow]:
    """Trains on random subsets and correlates, for each query, the models' losses with sums of scores.

    Finished models and measurements are found again, so an interrupted experiment resumes.

    Args:
        folder: Where `lds.json` goes.
        rankings: Method -> scores of all queries, over all training images.
        sweep: Trains the models and measures the queries on them.
        random_subsets: Which models are trained.

    Returns:
        A row for each method, and the ceiling where subsets are trained with further seeds.

    Raises:
        ValueError: A training failed, or a method did not score all training images; what is finished is kept.
        StorageError: A file could not be written.
    """
    ids = sweep.models.ids
    if not rankings:
        raise ValueError("A linear datamodeling score needs the scores of at least one method; none was given.")
    for method, results in rankings.items():
        cut = [scores.query.id for scores in results if set(scores.ids) != set(ids)]
        if cut:
            raise ValueError(f"{method} did not score all training images for query {cut[0]!r}: its sums mean nothing.")
    masks = random_subsets.masks(ids)
    queries = [scores.query.id for scores in next(iter(rankings.values()))]
    repeated = random_subsets.repeated
    seeds = random_subsets.further_seeds if repeated >= 3 else ()

    def job(row: int, seed: int) -> RetrainingJob:
        return RetrainingJob(tuple(name for name, seen in zip(ids, masks[row], strict=True) if not seen), seed)

    wanted = [job(row, random_subsets.seed) for row in range(random_subsets.count)]
    wanted += [job(row, seed) for seed in seeds for row in range(repeated)]
    measured = sweep.measure(wanted)

    def losses(count: int, seed: int) -> Float[NDArray[np.float64], "q m"]:
        return np.array([[measured[job(row, seed)][query].loss for row in range(count)] for query in queries])

    whole = losses(random_subsets.count, random_subsets.seed)
    rows = []
    for method, results in rankings.items():
        by_query = {scores.query.id: dict(zip(scores.ids, scores.scores, strict=True)) for scores in results}
        values = torch.tensor([[by_query[query][name] for name in ids] for query in queries], dtype=torch.float64)
        metric = LinearDatamodelingScore()
        metric.update(values, torch.from_numpy(masks), torch.from_numpy(whole))
        rows.append(_row(method, torch.cat([each.flatten() for each in metric.values])))
    if seeds:
        others = np.mean([losses(repeated, seed) for seed in seeds], axis=0)
        pairs = zip(whole[:, :repeated], others, strict=True)
        rows.append(_row(CEILING, torch.tensor([spearman(a, b) for a, b in pairs])))
    result = {
        "random_subsets": vars(random_subsets),
        "queries": queries,
        "prompts": {query.id: query.prompt for query in sweep.panel.queries},
        "rows": [vars(row) for row in rows],
    }
    write_json(folder / DATAMODELING, result)
    return rows


def _row(method: str, values: Float[Tensor, " q"]) -> DatamodelingRow:
    """The mean of the values that there are, and how sure it is."""
    numbers = values.double().numpy()
    known = numbers[np.isfinite(numbers)]
    low = high = float("nan")
    if len(known):
        drawn = np.random.default_rng(0).choice(known, (_BOOTSTRAP_SAMPLES, len(known))).mean(axis=1)
        low, high = (float(end) for end in np.quantile(drawn, (0.025, 0.975)))
    mean, error, low_or_none, high_or_none = or_none([*estimate(known), low, high])
    return DatamodelingRow(
        method=method,
        mean=mean,
        error=error,
        low=low_or_none,
        high=high_or_none,
        count=len(known),
        values=tuple(or_none(numbers)),
        undefined=len(numbers) - len(known),
    )


def as_table(rows: Sequence[DatamodelingRow]) -> str:
    """The table in Markdown."""
    lines = ["| method | Spearman | 95 % interval | n |", "|---|---|---|---|"]
    for each in rows:
        counted = f"{each.count} ({each.undefined} undefined: {EQUAL})" if each.undefined else str(each.count)
        if each.mean is None or each.low is None or each.high is None:
            lines.append(f"| {each.method} | undefined: {EQUAL} | – | {counted} |")
        else:
            error = "–" if each.error is None else f"{each.error:.3f}"
            lines.append(
                f"| {each.method} | {each.mean:.3f} ± {error} | {each.low:.3f} to {each.high:.3f} | {counted} |"
            )
    return "\n".join(lines)
