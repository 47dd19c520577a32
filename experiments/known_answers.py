"""Queries whose answer is known, drawn by the emoji model.

* own: the image and its own prompt, a training caption. The training image with that caption must be found, and the
  same concept in the other style.
* crossed: the image of A with the prompt of B. Where is A, in its own and in the other style, where is B?
* held-out: the prompt is a (concept, style) pair that was never trained on. Where is the concept in the other style?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.attributors import Query, Scores, TrainingData
from wherefrom.data.image_set import ImageSet
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.sources import generate
from wherefrom.rankings.ranking_file import normalised_ranks
from wherefrom.runtime.keyed_random import hash_text


@dataclass(frozen=True)
class Case:
    """A query and the training images that it should find."""

    query: Query
    targets: Mapping[str, str]


def choose(images: ImageSet, count: int, seed: int) -> list[int]:
    """Training images of distinct concepts that stay in training in both styles, by hash."""
    styles_of: dict[str, set[str]] = {}
    for concept, style in zip(images.columns["concept"], images.columns["style"], strict=True):
        styles_of.setdefault(concept, set()).add(style)
    order = sorted(range(len(images)), key=lambda index: hash_text(f"demo table/{seed}/{images.ids[index]}"))
    chosen: dict[str, int] = {}
    for index in order:
        concept = images.columns["concept"][index]
        if len(styles_of[concept]) == 2 and concept not in chosen:
            chosen[concept] = index
        if len(chosen) == count:
            break
    return list(chosen.values())


def other_style(name: str) -> str:
    """The id of the same concept in the other style."""
    style, concept = name.split("/")
    return f"{'openmoji' if style == 'twemoji' else 'twemoji'}/{concept}"


def make_cases(
    data: TrainingData, model: DiffusionModel, counts: Mapping[str, int], seed: int, eta: float
) -> dict[str, list[Case]]:
    """The three sets of queries."""
    assert data.latents is not None
    assert data.held_out is not None
    channels, rows, columns = data.latents.latent_shape
    images, held_out = data.images, data.held_out
    own = choose(images, counts["own"], seed)
    unseen = sorted(range(len(held_out)), key=lambda i: hash_text(f"demo table/{seed}/{held_out.ids[i]}"))[
        : counts["held-out"]
    ]
    prompts = [images.captions[index][0] for index in own] + [held_out.captions[index][0] for index in unseen]
    drawn = generate(model, prompts=prompts, seed=seed, shape=(channels, rows, columns), eta=eta, keep_trajectory=True)
    cases: dict[str, list[Case]] = {"own": [], "crossed": [], "held-out": []}
    for index, query in zip(own, drawn, strict=False):
        name = images.ids[index]
        cases["own"].append(Case(query, {"own": name, "other style": other_style(name)}))
    for index, query in zip(unseen, drawn[len(own) :], strict=True):
        cases["held-out"].append(Case(query, {"other style": other_style(held_out.ids[index])}))
    for position in range(counts["crossed"]):
        a, b = cases["own"][position], cases["own"][(position + counts["own"] // 2) % counts["own"]]
        query = replace(a.query, id=f"{a.query.id}x{b.query.id}", prompt=b.query.prompt)
        targets = {"own": a.targets["own"], "other style": a.targets["other style"], "prompt's": b.targets["own"]}
        cases["crossed"].append(Case(query, targets))
    return cases


def ranks(results: Sequence[Scores], cases: Sequence[Case], target: str) -> Float[NDArray[np.float64], " n"]:
    """Normalised rank of each case's target."""
    result = []
    for scores, case in zip(results, cases, strict=True):
        result.append(normalised_ranks(scores.ids, scores.scores)[scores.ids.index(case.targets[target])])
    return np.array(result)


def cell(values: Float[NDArray[np.float64], " n"]) -> str:
    """Median, and mean ± standard error."""
    return f"{np.median(values):.3f} ({values.mean():.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f})"
