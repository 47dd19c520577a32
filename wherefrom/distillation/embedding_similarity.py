"""Cosines between queries and training images in a ranker's embedding, block by block."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int32
from numpy.typing import NDArray

from wherefrom.distillation.ranker import Ranker
from wherefrom.distillation.teacher_set import Features

_BLOCK = 4096


def similarities(
    ranker: Ranker, features: Features, rows: Int32[NDArray[np.int32], "q m"] | None = None
) -> Float[NDArray[np.float64], "q m"]:
    """Cosine of each query with some training images, or with all.

    Args:
        ranker: The ranker.
        features: Its features of both sides, those of all encoders side by side.
        rows: The images of each query; None takes all, in their order.

    Raises:
        ValueError: The features have another width.
    """
    images, queries = (ranker.embed_all(side, _BLOCK) for side in (features.training, features.queries))
    if rows is None:
        return (queries @ images.T).double().cpu().numpy()
    result = np.empty(rows.shape)
    for index, (query, chosen) in enumerate(zip(queries, rows, strict=True)):
        result[index] = (images[torch.tensor(chosen, dtype=torch.long, device=images.device)] @ query).cpu().numpy()
    return result
