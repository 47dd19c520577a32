"""How many of an exact method's first images are among the candidates that a cheaper one chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.rankings.ranking_file import normalised_ranks


def recalls(
    exact: Float[NDArray[np.float64], "q n"],
    ids: Sequence[str],
    chosen: Mapping[str, Float[NDArray[np.float64], "q n"]],
    top: int,
    candidates: Sequence[int],
) -> dict[str, list[float]]:
    """Share of the exact method's first images among so many candidates, by how these are chosen.

    Args:
        exact: Scores of the exact method.
        ids: The images.
        chosen: Scores by the name of what chooses; a name that ends in "both tails" takes half from either end.
        top: How many of the exact method's first images are looked for.
        candidates: Numbers of candidates.
    """
    result: dict[str, list[float]] = {}
    wanted = [normalised_ranks(ids, scores) * len(ids) < top for scores in exact]
    for name, scores in chosen.items():
        places = np.stack([normalised_ranks(ids, each) * len(ids) for each in scores]).round()
        for k in candidates:
            last = k // 2 if name.endswith("both tails") else 0
            among = (places < k - last) | (places >= len(ids) - last)
            result.setdefault(name, []).append(
                float(np.mean([mine[want].mean() for mine, want in zip(among, wanted, strict=True)]))
            )
    return result
