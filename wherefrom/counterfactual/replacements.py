"""Replacements: the images that take over in a query's ranking once its first ones are left out of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wherefrom.counterfactual.reattribution import Reattribution
from wherefrom.counterfactual.removal import Removal
from wherefrom.counterfactual.replacement_prediction import ReplacementPrediction, evaluate_replacement_prediction
from wherefrom.counterfactual.results_file import or_none
from wherefrom.counterfactual.retraining import RetrainingJob
from wherefrom.data.image_set import ImageSet
from wherefrom.metrics.standard_error import estimate
from wherefrom.runtime.artifacts import identity_hash, replacing
from wherefrom.runtime.console import duration
from wherefrom.runtime.measured_cost import Cost

SHOWN = "shown"  # folder of the training images that the page shows
TOP = 5  # images shown before and after
_NUMBERS = ("spearman", "share", "chance")
_UNDER_CONTROL = ("spearman", "share")


@dataclass(frozen=True)
class Replacement:
    """What took the place of a query's removed images.

    Attributes:
        method: The method.
        k: How many of each query were removed.
        query: The query.
        model: Name of the retrained model.
        before: The first ids of the ranking under the model with all images.
        removed: Those of them that were left out.
        after: The first ids of the ranking under the retrained model.
        prediction: How well the first ranking predicted it.
        control: The same, had the model only been trained with another seed: what does not come from the removal. None
            without such a model.
    """

    method: str
    k: int
    query: str
    model: str
    before: list[str]
    removed: list[str]
    after: list[str]
    prediction: ReplacementPrediction
    control: ReplacementPrediction | None = None

    def as_json(self) -> dict[str, Any]:
        """Its parts by name."""
        return {**vars(self), "prediction": _numbers(self.prediction), "control": _numbers(self.control)}


def _numbers(result: ReplacementPrediction | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return dict(zip(_NUMBERS, or_none([result.spearman, result.share, result.chance]), strict=True))


def covering(removals: Sequence[Removal], count: int) -> list[Removal]:
    """The first of these removals that are about so many queries, or all of them."""
    chosen: list[Removal] = []
    for removal in removals:
        if sum(len(each.queries) for each in chosen) >= count:
            break
        chosen.append(removal)
    return chosen


def describe_reattribution(chosen: Sequence[Removal], costs: Mapping[str, Cost], control: bool = False) -> str:
    """Line for the log: how much will be attributed again, and how long it takes as far as costs are known.

    Args:
        chosen: The removals after which that is done.
        costs: Method -> what it took for the same queries.
        control: Whether that is done under another seed's model also; for several K it is done once.
    """
    runs = [(each.method, each.queries) for each in chosen]
    runs += list(dict.fromkeys(runs)) if control else []
    queries = sum(len(asked) for _, asked in runs)
    seconds = sum(len(asked) * costs[method].seconds for method, asked in runs if method in costs)
    about = f" (about {duration(seconds)}, and what methods make once for each model)" if seconds > 0 else ""
    return f"after the models, {queries} queries are attributed again, in {len(runs)} runs{about}"


def find_replacements(
    rankings: Mapping[str, Sequence[str]],
    removals: Sequence[Removal],
    reattribution: Reattribution,
    *,
    seed: int,
    control: int | None = None,
) -> list[Replacement]:
    """Attributes the queries of these removals again.

    Args:
        rankings: Query -> ids, the most influential first, under the model with all images.
        removals: Removals of one method and K.
        reattribution: Attributes under retrained models.
        seed: Seed of the retrained models.
        control: Another seed, under whose model of all images they are attributed also.

    Raises:
        ValueError: Training or attribution failed.
        StorageError: A file could not be written; finished queries are kept.
    """
    result = []
    for removal in removals:
        job, gone = RetrainingJob(removal.ids, seed), set(removal.ids)
        other = {} if control is None else reattribution(removal.method, RetrainingJob((), control), removal.queries)
        for query, after in sorted(reattribution(removal.method, job, removal.queries).items()):
            first = rankings[query]
            before = list(first[:TOP])
            left = [each for each in other.get(query, ()) if each not in gone]
            result.append(
                Replacement(
                    method=removal.method,
                    k=removal.k,
                    query=query,
                    model=reattribution.models.name(job),
                    before=before,
                    removed=[each for each in before if each in gone],
                    after=after[:TOP],
                    prediction=evaluate_replacement_prediction(first, gone, after, removal.k),
                    control=evaluate_replacement_prediction(first, gone, left, removal.k) if query in other else None,
                )
            )
    return result


def mean_replacement_prediction(result: Sequence[Replacement]) -> dict[str, Any]:
    """Means over the queries and standard errors of one method and K, as JSON has them."""
    numbers = {
        kind: or_none(estimate(np.array([getattr(each.prediction, kind) for each in result]))) for kind in _NUMBERS
    }
    controls = [each.control for each in result if each.control is not None]
    for kind in _UNDER_CONTROL if controls else ():
        numbers[f"control_{kind}"] = or_none(estimate(np.array([getattr(each, kind) for each in controls])))
    return {"method": result[0].method, "k": result[0].k, "queries": len(result), **numbers}


def write_shown(folder: Path, images: ImageSet, ids: Sequence[str]) -> dict[str, str]:
    """Writes the training images that the page shows.

    Args:
        folder: The run folder.
        images: The training images.
        ids: Which of them.

    Returns:
        Id -> first caption.

    Raises:
        StorageError: A file could not be written.
    """
    where = {name: index for index, name in enumerate(images.ids)}
    captions = {}
    for name in sorted(set(ids)):
        captions[name] = images.captions[where[name]][0]
        with replacing(shown_file(folder, name)) as temporary:
            Image.fromarray(np.asarray(images.pixels[where[name]])).save(temporary, "PNG")
    return captions


def shown_file(folder: Path, name: str) -> Path:
    """Where a training image that the page shows is kept; hashed, since ids may hold anything."""
    return folder / SHOWN / f"{identity_hash({'picture': name})}.png"
