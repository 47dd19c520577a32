"""Who replaces what was removed: the same queries attributed again, under the model that was trained without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wherefrom.attributors.base import Attributor
from wherefrom.commands.attribute import attribute, run_identity
from wherefrom.counterfactual.effects import or_none
from wherefrom.counterfactual.removal import Removal
from wherefrom.counterfactual.replacement_prediction import Foresight, foresight
from wherefrom.counterfactual.retraining import Retrain, Retrains
from wherefrom.data.image_set import ImageSet, keep_indices
from wherefrom.metrics.standard_error import estimate
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.rankings.ranking_file import read_ranking
from wherefrom.reports.query_section import ReportOptions
from wherefrom.runtime.artifacts import MANIFEST, Store, check_identity, identity_hash, read_manifest, replacing
from wherefrom.runtime.console import Log, duration, no_log
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.measured_cost import Cost

AFTER, SHOWN = "after", "shown"  # folders: runs under retrained models, and the images that the judge's page shows
_NUMBERS = ("spearman", "share", "chance")
_UNDER_CONTROL = ("spearman", "share")
TOP = 5  # images shown before and after


class Reattribution:
    """Attributes queries under retrained models, among the images that these were trained on.

    Each run has a folder, named by model and method. A finished one is read without its model, whose weights may have
    been deleted; an interrupted one goes on.

    Args:
        folder: Where the run folders go.
        methods: Name -> method.
        data: The whole training set and the null.
        retrains: The models.
        queries: The queries, as the model with all images drew them.
        store: Where methods keep what they make.
        runner: This process's place.
        options: What the runs' pages show.
        log: Receives lines about what is being done.
    """

    def __init__(
        self,
        folder: Path,
        *,
        methods: Mapping[str, Attributor],
        data: TrainingData,
        retrains: Retrains,
        queries: Sequence[Query],
        store: Store,
        runner: Runner,
        options: ReportOptions = ReportOptions(),
        log: Log = no_log,
    ) -> None:
        self.folder, self.methods, self.data, self.retrains = folder, methods, data, retrains
        self.queries = {query.id: query for query in queries}
        self.store, self.runner, self.options, self.log = store, runner, options, log

    def asks_model(self, method: str) -> bool:
        """Whether another model can change this method's ranking of the same images."""
        return "model" in self.methods[method].requires

    def __call__(self, method: str, retrain: Retrain, queries: Sequence[str]) -> dict[str, list[str]]:
        """Query -> ids of what the model was trained on, the most influential first.

        Args:
            method: The method's name.
            retrain: The model.
            queries: Ids of the queries.

        Raises:
            ArtifactMismatchError: The run folder holds a run of other images or of a method with other settings.
            ValueError: Training failed, or the method cannot attribute a query.
            StorageError: A file could not be written; finished queries are kept.
        """
        asked = [self.queries[query] for query in sorted(queries)]
        data, attributor = self.left(retrain), self.methods[method]
        identity = run_identity(attributor, data, None, asked, self.store)
        place = self.place(method, retrain, identity["queries"])
        manifest = read_manifest(place) if (place / MANIFEST).exists() else {}
        if manifest.get("complete"):
            # The folder's name decides the model.
            check_identity(place, {**identity, "model": manifest["identity"]["model"]})
            return {query: ids for query, (ids, _) in read_ranking(place).items()}
        self.log(f"{method} again, without {len(retrain.exclude)} images")
        model = self.retrains.model(retrain).to(self.runner.device)
        results = attribute(
            place,
            attributor=attributor,
            data=data,
            model=model,
            queries=asked,
            store=self.store,
            runner=self.runner,
            options=self.options,
            log=self.log,
        )
        return {scores.query.id: whole_ranking(scores) for scores in results}

    def left(self, retrain: Retrain) -> TrainingData:
        """What the model was trained on.

        Raises:
            ValueError: An excluded id is not in the training set.
        """
        kept = keep_indices(self.data.images.ids, retrain.exclude)
        latents = None if self.data.latents is None else self.data.latents.subset(kept)
        return TrainingData(self.data.images.subset(kept), latents, self.data.held_out, self.data.held_out_latents)

    def place(self, method: str, retrain: Retrain, queries: Any) -> Path:
        """The run folder.

        Two pools may name the same images, and so the same model: the second has a folder of its own.
        """
        place = self.folder / self.retrains.name(retrain) / method
        if (place / MANIFEST).exists() and read_manifest(place)["identity"].get("queries") != queries:
            return place.with_name(f"{method} {identity_hash({'queries': queries})}")
        return place


def whole_ranking(scores: Scores) -> list[str]:
    """All ids, the most influential first."""
    return [name for name, _ in scores.top(len(scores.ids))]


@dataclass(frozen=True)
class Replacement:
    """What took the place of a query's removed images.

    Attributes:
        method: The method.
        k: How many of each query were removed.
        query: The query.
        model: The retrained model.
        before: The first ids of the ranking under the model with all images.
        removed: Those of them that were left out.
        after: The first ids of the ranking under the retrained model.
        foresight: Whether the first ranking foresaw it.
        control: The same, had the model only been trained with another seed: what both say beside the removal. None
            without such a model.
    """

    method: str
    k: int
    query: str
    model: str
    before: list[str]
    removed: list[str]
    after: list[str]
    foresight: Foresight
    control: Foresight | None = None

    def as_json(self) -> dict[str, Any]:
        """Its parts by name."""
        return {**vars(self), "foresight": _numbers(self.foresight), "control": _numbers(self.control)}


def _numbers(seen: Foresight | None) -> dict[str, Any] | None:
    if seen is None:
        return None
    return dict(zip(_NUMBERS, or_none([seen.spearman, seen.share, seen.chance]), strict=True))


def covering(removals: Sequence[Removal], count: int) -> list[Removal]:
    """The first of these removals that are about so many queries, or all of them."""
    chosen: list[Removal] = []
    for removal in removals:
        if sum(len(each.queries) for each in chosen) >= count:
            break
        chosen.append(removal)
    return chosen


def after_plan(chosen: Sequence[Removal], costs: Mapping[str, Cost], control: bool = False) -> str:
    """How much will be attributed again, and how long it takes as far as the first attributions say.

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


def replacements(
    rankings: Mapping[str, Sequence[str]],
    removals: Sequence[Removal],
    again: Reattribution,
    seed: int,
    control: int | None = None,
) -> list[Replacement]:
    """Attributes the queries of these removals again.

    Args:
        rankings: Query -> ids from the most influential, under the model with all images.
        removals: Removals of one method and K.
        again: Attributes under retrained models.
        seed: Seed of the retrained models.
        control: Another seed, whose model with all images is asked also.

    Raises:
        ValueError: Training or attribution failed.
        StorageError: A file could not be written; finished queries are kept.
    """
    result = []
    for removal in removals:
        retrain, gone = Retrain(removal.ids, seed), set(removal.ids)
        name = again.retrains.name(retrain)
        other = {} if control is None else again(removal.method, Retrain((), control), removal.queries)
        for query, after in sorted(again(removal.method, retrain, removal.queries).items()):
            first = rankings[query]
            before = list(first[:TOP])
            seen = foresight(first, gone, after, removal.k)
            left = [each for each in other.get(query, ()) if each not in gone]
            by_chance = foresight(first, gone, left, removal.k) if query in other else None
            removed = [each for each in before if each in gone]
            result.append(
                Replacement(removal.method, removal.k, query, name, before, removed, after[:TOP], seen, by_chance)
            )
    return result


def foreseen(result: Sequence[Replacement]) -> dict[str, Any]:
    """Means over the queries and standard errors of one method and K, as JSON has them."""
    numbers = {
        kind: or_none(estimate(np.array([getattr(each.foresight, kind) for each in result]))) for kind in _NUMBERS
    }
    controls = [each.control for each in result if each.control is not None]
    for kind in _UNDER_CONTROL if controls else ():
        numbers[f"control_{kind}"] = or_none(estimate(np.array([getattr(each, kind) for each in controls])))
    return {"method": result[0].method, "k": result[0].k, "queries": len(result), **numbers}


def write_shown(folder: Path, images: ImageSet, ids: Sequence[str]) -> dict[str, str]:
    """Writes the images that the judge's page shows, and says their captions.

    Args:
        folder: The judge's run folder.
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
    """Where an image that the page shows is kept; ids may hold anything."""
    return folder / SHOWN / f"{identity_hash({'picture': name})}.png"
