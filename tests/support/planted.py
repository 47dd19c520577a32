"""A teacher whose rankings are planted: cosine in the embedding of a random MLP, over random features."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from wherefrom.distillation.ranker import Ranker
from wherefrom.distillation.teacher_set import Features, TeacherSet


def planted_teacher(
    queries: int = 12, images: int = 30, width: int = 6, scored: int | None = None, seed: int = 0
) -> TeacherSet:
    """A teacher set with the features `first` (two thirds of the width) and `second`, of everything or of neighbours.

    Args:
        queries: Number of queries.
        images: Number of training images.
        width: Width of the features, side by side.
        scored: The teacher scores this many nearest images (cosine of the raw features); None is all.
        seed: Seed of features and teacher.
    """
    random = torch.Generator().manual_seed(seed)
    sides = [torch.randn(count, width, generator=random) for count in (queries, images)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = Ranker(width, width=2 * width, hidden=1, outputs=3, dropout=0.0)
    with torch.no_grad():
        scores = teacher.embed(sides[0]) @ teacher.embed(sides[1]).T
    near = (F.normalize(sides[0], dim=1) @ F.normalize(sides[1], dim=1).T).topk(scored or images, dim=1).indices
    order = scores.gather(1, near).argsort(dim=1, descending=True)
    rows = near.gather(1, order)
    cut = 2 * width // 3
    parts = {"first": slice(0, cut), "second": slice(cut, None)}
    return TeacherSet(
        tuple(f"picture/{index:04d}" for index in range(images)),
        tuple(f"caption {index}" for index in range(images)),
        tuple(f"query/{index:03d}" for index in range(queries)),
        tuple(f"prompt {index}" for index in range(queries)),
        rows.numpy().astype(np.int32),
        scores.gather(1, rows).numpy().astype(np.float32),
        {name: Features(sides[1][:, part].numpy(), sides[0][:, part].numpy()) for name, part in parts.items()},
        {"teacher": "planted", "seed": seed},
    )
