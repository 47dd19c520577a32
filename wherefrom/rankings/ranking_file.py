"""Rankings on disk: `ranking.parquet` with query, rank (from 1), image and score, sorted by query and rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from wherefrom.rankings.estimates import Estimates
from wherefrom.runtime.artifacts import replacing

RANKING, PARTS = "ranking.parquet", "parts.parquet"


def order_of(ids: Sequence[str], scores: Float[NDArray[np.float64], " n"]) -> Int64[NDArray[np.int64], " n"]:
    """Sorts positions from the highest score to the lowest; ties are broken by id.

    Raises:
        ValueError: A score is not finite.
    """
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise ValueError(f"The score of image {ids[bad[0]]!r} is {scores[bad[0]]}; rankings need finite scores.")
    return np.lexsort((np.asarray(ids), -scores))


def normalised_ranks(ids: Sequence[str], scores: Float[NDArray[np.float64], " n"]) -> Float[NDArray[np.float64], " n"]:
    """Computes (rank - 1) / n of each image: 0 is the most influential."""
    ranks = np.empty(len(ids))
    ranks[order_of(ids, scores)] = np.arange(len(ids)) / len(ids)
    return ranks


def flatness_of(scores: Float[NDArray[np.float64], " n"]) -> float:
    """Computes how evenly the influence above the median is spread over the images that have any.

    (Σw)² / (m Σw²), w the m positive differences from the median: the effective number of influential images (the
    inverse participation ratio) as a share of their number. 1 if all are equal, 3/4 for a uniform distribution,
    2/π for a normal one, near 0 where few images hold it all; 1 if no score is above the median.
    """
    above = scores - np.median(scores)
    weights = above[above > 0]
    return float(weights.sum() ** 2 / (len(weights) * np.square(weights).sum())) if len(weights) else 1.0


def write_parts(
    folder: Path,
    parts: Mapping[str, tuple[Sequence[str], Mapping[str, Float[NDArray[np.float64], " n"]]]],
) -> None:
    """Writes scores by part: columns query, part, image and score, in the order of the parts and of the images.

    Args:
        folder: Where `parts.parquet` goes.
        parts: Query id -> (image ids, part -> scores).

    Raises:
        StorageError: The file could not be written.
    """
    tables = []
    for query in sorted(parts):
        ids, by_part = parts[query]
        for part, scores in by_part.items():
            columns = {
                "query": pa.array([query] * len(ids), pa.string()),
                "part": pa.array([part] * len(ids), pa.string()),
                "image": pa.array(list(ids), pa.string()),
                "score": pa.array(scores, pa.float64()),
            }
            tables.append(pa.table(columns))
    with replacing(folder / PARTS) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)


def write_ranking(
    folder: Path,
    rankings: Mapping[str, tuple[Sequence[str], Float[NDArray[np.float64], " n"]]],
    p_values: Mapping[str, Float[NDArray[np.float64], " n"]] | None = None,
    estimates: Mapping[str, tuple[Sequence[str], Estimates]] | None = None,
    repeats: Mapping[str, int] | None = None,
) -> None:
    """Writes the rankings of several queries.

    Args:
        folder: Where `ranking.parquet` goes.
        rankings: Query id -> (image ids, scores).
        p_values: Query id -> p-values in the same order, as a further column.
        estimates: Query id -> (image ids, calibrated estimates), as the columns estimate, low and high.
        repeats: Image id -> how often training saw it, as a further column.

    Raises:
        StorageError: The file could not be written.
    """
    parts = []
    for query in sorted(rankings):
        ids, scores = rankings[query]
        order = order_of(ids, scores)
        columns = {
            "query": pa.array([query] * len(order), pa.string()),
            "rank": pa.array(np.arange(1, len(order) + 1), pa.int64()),
            "image": pa.array([ids[index] for index in order], pa.string()),
            "score": pa.array(scores[order], pa.float64()),
        }
        if p_values is not None:
            columns["p_value"] = pa.array(p_values[query][order], pa.float64())
        if estimates is not None:
            known, estimated = estimates[query]
            place = {name: index for index, name in enumerate(known)}
            rows = [place[ids[index]] for index in order]
            for name, values in (("estimate", estimated.values), ("low", estimated.low), ("high", estimated.high)):
                columns[name] = pa.array(values[rows], pa.float64())
        if repeats is not None:
            columns["repeats"] = pa.array([repeats[ids[index]] for index in order], pa.int64())
        parts.append(pa.table(columns))
    with replacing(folder / RANKING) as temporary:
        pq.write_table(pa.concat_tables(parts), temporary)


def read_ranking(folder: Path) -> dict[str, tuple[list[str], Float[NDArray[np.float64], " n"]]]:
    """Reads rankings: query id -> (image ids from the most influential, their scores)."""
    table = pq.read_table(folder / RANKING).to_pydict()
    rankings: dict[str, tuple[list[str], list[float]]] = {}
    for query, image, score in zip(table["query"], table["image"], table["score"], strict=True):
        ids, scores = rankings.setdefault(query, ([], []))
        ids.append(image)
        scores.append(score)
    return {query: (ids, np.asarray(scores)) for query, (ids, scores) in rankings.items()}
