"""Feature ablation of a ranker: mAP(k) with each encoder's features permuted in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.distillation.embedding_similarity import similarities
from wherefrom.distillation.ranker import Ranker
from wherefrom.distillation.teacher_set import Features, TeacherSet
from wherefrom.metrics.retrieval import Cutoff, MeanAveragePrecision
from wherefrom.metrics.standard_error import estimate
from wherefrom.runtime.keyed_random import hash_text


@dataclass(frozen=True)
class AblationResult:
    """Retrieval quality of a ranker with one encoder's features permuted.

    Attributes:
        mean: mAP(k), mean over queries.
        error: Its standard error.
        drop: Decrease of mAP(k), mean over queries; about 0 means that the encoder is ignored.
        drop_error: Its standard error, paired by query.
        count: Number of queries.
    """

    mean: float
    error: float
    drop: float
    drop_error: float
    count: int


def ablate_features(
    teacher: TeacherSet,
    *,
    ranker: Ranker,
    features: Sequence[str],
    widths: Mapping[str, int],
    k: float = 0.0085,
    seed: int = 0,
) -> dict[str, AblationResult]:
    """Computes mAP(k) with each encoder's features permuted across training images and across queries.

    The permutation has no fixed points: every image and query gets the features of another one. Rankings are of the
    images that the teacher scored, and the share `k` is of these.

    Args:
        teacher: Queries that the ranker was not trained on.
        ranker: The ranker.
        features: Names of the features that it takes, in order.
        widths: Encoder -> width of its features, in the order of the columns, such as
            `{"dino": 768, "clip_text": 512}`.
        k: A number of images, or a share of them.
        seed: Seed of the permutations.

    Returns:
        Encoder -> result without its features; the first entry, "nothing", ablates nothing.

    Raises:
        ValueError: The widths are not those of the features, or there are fewer than two queries.
    """
    both = teacher.concatenated(features)
    width = both.training.shape[1]
    if sum(widths.values()) != width or min(widths.values(), default=0) < 1:
        raise ValueError(
            f"The widths are {', '.join(f'{name} {size}' for name, size in widths.items()) or 'none'}; they must be "
            f"positive and sum to the {width} features."
        )
    if len(teacher.queries) < 2:
        raise ValueError("Features can be permuted across at least two queries; there is one.")
    cutoff = Cutoff.of(k, teacher.rows.shape[1])
    baseline = _average_precisions(teacher, ranker, both, cutoff)
    results, start = {"nothing": _result(baseline, baseline)}, 0
    for name, size in widths.items():
        columns = slice(start, start + size)
        changed = Features(
            *(
                _permuted(matrix, columns, hash_text(f"{seed}/{name}/{side}") % 2**32)
                for side, matrix in (("training", both.training), ("queries", both.queries))
            )
        )
        results[name] = _result(_average_precisions(teacher, ranker, changed, cutoff), baseline)
        start += size
    return results


def _permuted(matrix: Float[NDArray[np.float32], "n d"], columns: slice, seed: int) -> NDArray[np.float32]:
    """Permutes columns across the rows by one random cycle through all rows."""
    order = np.random.default_rng(seed).permutation(len(matrix))
    changed = np.array(matrix)
    changed[order, columns] = matrix[np.roll(order, 1), columns]
    return changed


def _average_precisions(teacher: TeacherSet, ranker: Ranker, features: Features, cutoff: Cutoff) -> Float[Tensor, " q"]:
    cosines = similarities(ranker, features, teacher.rows)
    # By position, so that the sums run in one order whatever the teacher is; ties are taken in all orders.
    order = np.argsort(teacher.rows, axis=1)
    metric = MeanAveragePrecision()
    metric.update(torch.from_numpy(np.take_along_axis(cosines, order, axis=1)), torch.from_numpy(order < cutoff.number))
    return torch.cat(metric.values)


def _result(ablated: Float[Tensor, " q"], baseline: Float[Tensor, " q"]) -> AblationResult:
    return AblationResult(*estimate(ablated.numpy()), *estimate((baseline - ablated).numpy()), len(ablated))
