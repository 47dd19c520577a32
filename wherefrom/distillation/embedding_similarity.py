"""Cosine similarities between queries and training images in a ranker's embedding, computed in blocks."""

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
    """Computes the cosine similarity of each query with some training images, or with all.

    Args:
        ranker: The ranker.
        features: Features of training images and queries, those of all encoders concatenated.
        rows: Positions of the images of each query; None takes all, in order.

    Raises:
        ValueError: The features have another width.
    """
    images, queries = (ranker.embed_all(side, _BLOCK) for side in (features.training, features.queries))
    if rows is None:
        return (queries @ images.T).double().cpu().numpy()
    cosines = np.empty(rows.shape)
    for index, (query, chosen) in enumerate(zip(queries, rows, strict=True)):
        cosines[index] = (images[torch.tensor(chosen, dtype=torch.long, device=images.device)] @ query).cpu().numpy()
    return cosines
