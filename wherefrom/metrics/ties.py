"""Ties: images that a method scores alike. What a ranking is worth is then its mean over all orders of each tie.

Closed forms of McSherry and Najork 2008 ("Computing Information Retrieval Performance Measures Efficiently in the
Presence of Tied Scores"). Without ties each is the ordinary value, to the last bit.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

_ROUNDING = 4.0  # roundings that two computations of one number may differ by

EQUAL = "constant scores"  # why a value is undefined, in tables and on pages


def is_constant(values: NDArray[np.floating] | Tensor) -> bool:
    """Whether all values are equal, as far as their own precision can tell.

    That is: they differ by no more than four roundings of the largest (four times the precision's ε times the largest
    magnitude). Larger differences are taken for real: only who computed the values knows their noise.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if values.size == 0:
        return True
    eps = float(np.finfo(values.dtype).eps) if np.issubdtype(values.dtype, np.floating) else 0.0
    return float(np.ptp(values)) <= _ROUNDING * eps * float(np.abs(values).max())


def sums_are_constant(sums: Float[Tensor, " m"], scores: Float[Tensor, " n"], subsets: Bool[Tensor, "m n"]) -> bool:
    """Whether sums of scores over subsets are equal, as far as rounding can tell.

    A score is known to its own ε; adding n of them rounds n times in float64. So sums that differ by no more than
    (ε + n ε₆₄) Σ|score| are equal: those of constant scores over equally large subsets are.
    """
    eps = float(torch.finfo(scores.dtype).eps) if scores.dtype.is_floating_point else 0.0
    mass = float((subsets.double() @ scores.double().abs()).max())
    bound = (eps + scores.shape[0] * float(torch.finfo(torch.float64).eps)) * mass
    return float(sums.max() - sums.min()) <= bound


def expected_hits(
    hits: Bool[Tensor, "q n"], tied: Bool[Tensor, "q n"]
) -> tuple[Float[Tensor, "q n"], Float[Tensor, "q n"]]:
    """Chance of a relevant image at each place, and mean precision there if it is one, over all orders of each tie.

    With a tie of m images, r of them relevant, below s places of which R are relevant, the chance at its j-th place is
    r / m, and the mean precision given a relevant image there (R + 1 + (j - 1) (r - 1) / (m - 1)) / (s + j).

    Args:
        hits: Relevance of the images in the order of their scores; within a tie in any order.
        tied: Whether an image ties with the one before it.
    """
    places = torch.arange(hits.shape[1], device=hits.device).expand(hits.shape)
    last = torch.ones_like(tied)
    last[:, :-1] = ~tied[:, 1:]
    start = torch.where(tied, 0, places).cummax(dim=1).values
    stop = torch.where(last, places, hits.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    found = hits.long().cumsum(dim=1)
    before = found.gather(1, start) - hits.long().gather(1, start)
    size, relevant = (stop - start + 1).double(), (found.gather(1, stop) - before).double()
    others = (places - start).double() * (relevant - 1) / (size - 1).clamp(min=1)
    return relevant / size, (before.double() + 1 + others) / (places + 1)


def average_precision(hits: Bool[Tensor, "q n"], tied: Bool[Tensor, "q n"]) -> Float[Tensor, " q"]:
    """Mean average precision of each query over all orders of each tie; see `expected_hits`."""
    chance, precision = expected_hits(hits, tied)
    return (precision * chance).sum(dim=1) / hits.sum(dim=1)


def recall(hits: Bool[Tensor, "q n"], tied: Bool[Tensor, "q n"], k: int) -> Float[Tensor, " q"]:
    """Mean share of the relevant images among the first k, over all orders of each tie."""
    chance, _ = expected_hits(hits, tied)
    return chance[:, :k].sum(dim=1) / hits.sum(dim=1)


def first_hit(hits: Bool[Tensor, "q n"], tied: Bool[Tensor, "q n"]) -> Float[Tensor, " q"]:
    """Mean place of the first relevant image, from 1, over all orders of each tie.

    With r relevant images in a tie of m below s places that is s + (m + 1) / (r + 1).
    """
    chance, _ = expected_hits(hits, tied)
    start = (chance > 0).int().argmax(dim=1, keepdim=True)  # the first place of the first tie with a relevant image
    same = torch.where(tied, 0, 1).cumsum(dim=1)
    group = same == same.gather(1, start)
    size, relevant = group.sum(dim=1).double(), (group & hits).sum(dim=1).double()
    return start[:, 0].double() + (size + 1) / (relevant + 1)
