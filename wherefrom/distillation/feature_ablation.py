"""Does a ranker use both halves of concatenated features, or only the images' half, or only the captions'?"""

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
from wherefrom.metrics.retrieval import Depth, MeanAveragePrecision
from wherefrom.metrics.standard_error import estimate
from wherefrom.runtime.keyed_random import hash_text


@dataclass(frozen=True)
class Shuffled:
    """What a ranker finds when one half of its features is another image's.

    Attributes:
        mean: mAP(k), mean over queries.
        error: Its standard error.
        drop: By how much mAP(k) falls, mean over queries; about 0 means that the half is ignored.
        drop_error: Its standard error, query by query.
        count: Queries.
    """

    mean: float
    error: float
    drop: float
    drop_error: float
    count: int


def shuffled_halves(
    teacher: TeacherSet,
    *,
    ranker: Ranker,
    features: Sequence[str],
    halves: Mapping[str, int],
    k: float = 0.0085,
    seed: int = 0,
) -> dict[str, Shuffled]:
    """mAP(k) with each half in turn shuffled across training images and across queries.

    Every image gets the half of another one, so no query keeps its own. Rankings are of the images that the
    teacher scored, and the share `k` is of these.

    Args:
        teacher: Queries that the ranker was not trained on.
        ranker: The ranker.
        features: Names of the features that it takes, in their order.
        halves: Name -> width, in the order of the columns, such as `{"dino": 768, "clip_text": 512}`.
        k: A number of images, or a share of them.
        seed: Decides who gets whose half.

    Returns:
        Half -> what is found without it; the first entry, "nothing", is with the features as they are.

    Raises:
        ValueError: The widths are not those of the features, or there are fewer than two queries.
    """
    both = teacher.concatenated(features)
    width = both.training.shape[1]
    if sum(halves.values()) != width or min(halves.values(), default=0) < 1:
        raise ValueError(
            f"The halves are {', '.join(f'{name} {size}' for name, size in halves.items()) or 'none'}: positive widths "
            f"must sum to the {width} features."
        )
    if len(teacher.queries) < 2:
        raise ValueError("Halves can be shuffled across at least two queries; there is one.")
    depth = Depth.of(k, teacher.rows.shape[1])
    whole = _average_precisions(teacher, ranker, both, depth)
    result, start = {"nothing": _shuffled(whole, whole)}, 0
    for name, size in halves.items():
        columns = slice(start, start + size)
        changed = Features(
            *(
                _with_others(matrix, columns, hash_text(f"{seed}/{name}/{side}") % 2**32)
                for side, matrix in (("training", both.training), ("queries", both.queries))
            )
        )
        result[name] = _shuffled(_average_precisions(teacher, ranker, changed, depth), whole)
        start += size
    return result


def _with_others(matrix: Float[NDArray[np.float32], "n d"], columns: slice, seed: int) -> NDArray[np.float32]:
    """The columns handed on around one random circle of all rows."""
    order = np.random.default_rng(seed).permutation(len(matrix))
    changed = np.array(matrix)
    changed[order, columns] = matrix[np.roll(order, 1), columns]
    return changed


def _average_precisions(teacher: TeacherSet, ranker: Ranker, features: Features, depth: Depth) -> Float[Tensor, " q"]:
    cosines = similarities(ranker, features, teacher.rows)
    # Ties are broken by position: the teacher's own order would hand its answer to a ranker that knows nothing.
    order = np.argsort(teacher.rows, axis=1)
    metric = MeanAveragePrecision()
    metric.update(torch.from_numpy(np.take_along_axis(cosines, order, axis=1)), torch.from_numpy(order < depth.number))
    return torch.cat(metric.values)


def _shuffled(result: Float[Tensor, " q"], whole: Float[Tensor, " q"]) -> Shuffled:
    return Shuffled(*estimate(result.numpy()), *estimate((whole - result).numpy()), len(result))
