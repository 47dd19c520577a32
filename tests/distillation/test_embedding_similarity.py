"""Cosines in a ranker's embedding, against one pair at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from wherefrom.distillation import embedding_similarity
from wherefrom.distillation.embedding_similarity import similarities
from wherefrom.distillation.ranker import Ranker
from wherefrom.distillation.teacher_set import Features


def test_blocks_subsets_mapping_and_mode_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    ranker = Ranker(5, width=7, hidden=2, outputs=4, dropout=0.5).double().train()
    features = Features(random.normal(size=(11, 5)), random.normal(size=(3, 5)))
    whole = similarities(ranker, features)
    assert ranker.training
    ranker.eval()
    for query in range(3):
        for image in range(11):
            pair = [ranker.mlp(torch.from_numpy(side)) for side in (features.queries[query], features.training[image])]
            assert whole[query, image] == pytest.approx(torch.cosine_similarity(*pair, dim=0).item(), abs=1e-12)
    rows = np.stack([random.permutation(11)[:6] for _ in range(3)]).astype(np.int32)
    np.testing.assert_allclose(similarities(ranker, features, rows), np.take_along_axis(whole, rows, 1), atol=1e-12)
    monkeypatch.setattr(embedding_similarity, "_BLOCK", 2)
    np.save(tmp_path / "training.npy", features.training)
    mapped = Features(np.load(tmp_path / "training.npy", mmap_mode="r"), features.queries)
    np.testing.assert_allclose(similarities(ranker, mapped), whole, atol=1e-12)
    with pytest.raises(ValueError, match="takes 5 features, given 4"):
        similarities(ranker, Features(features.training[:, :4], features.queries))
