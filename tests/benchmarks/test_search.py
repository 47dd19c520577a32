"""The vectors that searches are measured on, and the exact search they are compared with."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import search


def drawn(kind: str, count: int, **further: object) -> np.ndarray:
    return np.concatenate(list(search.chunks(kind, count, **further))).astype(np.float64)


def test_vectors_are_seeded_and_of_their_dimension() -> None:
    dimensions = {}
    for kind in search.KINDS:
        vectors = drawn(kind, 1500)
        assert vectors.shape == (1500, 768)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(1500), abs=2e-3)
        assert np.array_equal(vectors, drawn(kind, 1500))
        assert (drawn(kind, 5, of="queries") @ vectors.T).max() < 0.95, "no query is a training vector"
        power = np.linalg.svd(vectors, compute_uv=False) ** 2
        dimensions[kind] = power.sum() ** 2 / (power**2).sum()  # participation ratio
    assert dimensions["manifold"] < 100 < 300 < dimensions["random"]


def test_exact_is_brute_force_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CHUNK", 64)
    vectors = drawn("random", 200).astype(np.float16)
    queries = search.queries_of("random", 7)
    result = search.exact(vectors, queries, 10)
    truth = np.argsort(-(vectors.astype(np.float64) @ queries.T.astype(np.float64)), axis=0)[:10].T
    assert np.array_equal(np.sort(result, axis=1), np.sort(truth, axis=1))


@pytest.mark.parametrize("size", search.FACTORIES)
def test_every_factory_string_has_settings(size: int) -> None:
    for factory in search.FACTORIES[size]:
        settings = search.settings_of(factory)
        assert len(settings) > 5 or factory == "Flat"
        assert len(set(settings)) == len(settings)
