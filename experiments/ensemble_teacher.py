r"""A teacher set of several: their ranks averaged over the images that the first one scored.

    python -m experiments.ensemble_teacher --sets runs/emoji_1k_teacher runs/emoji_1k_teacher_bank \
        runs/emoji_1k_teacher_trak --output runs/emoji_1k_teacher_ensemble

The same set as `evaluate.py curate --teacher` makes of a `RankEnsemble` of these teachers, without asking them again.
All sets must be of the same queries and training set, and the others must have scored what the first did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.support.arguments import script_parser
from wherefrom.distillation.teacher_set import TeacherSet, read_teacher_set, write_teacher_set
from wherefrom.rankings.ranking_file import normalised_ranks, order_of


def ensemble(sets: Sequence[TeacherSet]) -> TeacherSet:
    """The first set, with minus the mean of all sets' normalised ranks for scores.

    Raises:
        ValueError: There are fewer than two, or their training images, queries or scored images do not fit.
    """
    first = sets[0]
    if len(sets) < 2:
        raise ValueError(f"An ensemble needs at least two teacher sets; given {len(sets)}.")
    for position, other in enumerate(sets[1:], start=2):
        if other.images != first.images or other.queries != first.queries:
            raise ValueError(f"Set {position} is not of the training images and queries of the first.")
    rows, scores = np.empty_like(first.rows), np.empty_like(first.scores)
    matrices = [each.by_image() for each in sets]
    for place, (query, candidates) in enumerate(zip(first.queries, first.rows, strict=True)):
        ids = [first.images[row] for row in candidates]
        given = np.stack([matrix[place, candidates] for matrix in matrices])
        if np.isnan(given).any():
            missing = ids[int(np.flatnonzero(np.isnan(given).any(axis=0))[0])]
            raise ValueError(f"A set did not score {missing!r} for the query {query!r}; the first did.")
        ranks = [normalised_ranks(ids, scores_of) for scores_of in given]
        result = -np.mean(ranks, axis=0)
        order = order_of(ids, result)
        rows[place], scores[place] = candidates[order], result[order]
    identity = {"method": "rank ensemble", "of": [dict(each.identity) for each in sets]}
    return replace(first, rows=rows, scores=scores, identity=identity)


def main() -> None:
    """Reads, averages and writes."""
    parser = script_parser(__doc__)
    parser.add_argument("--sets", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    result = ensemble([read_teacher_set(options.sets[0]), *(read_teacher_set(each, []) for each in options.sets[1:])])
    write_teacher_set(options.output, result)
    print(f"{len(result.queries)} queries, {result.rows.shape[1]} scored images each: {options.output}")


if __name__ == "__main__":
    main()
