"""Do two protocols order the methods alike: numbers of hand-made judgements."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau, pearsonr, spearmanr

from experiments import protocols


def write(folder: Path, rows: dict[tuple[str, int], dict[str, float | None]]) -> Path:
    folder.mkdir()
    stored = [
        {"method": method, "k": k, "queries": list(own), "loss": {"own": list(own.values()), "others": []}}
        for (method, k), own in rows.items()
    ]
    content = {"rows": stored, "prompts": {"q": "a fox", "r": "a cat"}}
    (folder / "counterfactual.json").write_text(json.dumps(content))
    return folder


def test_orders_are_compared_on_what_both_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pooled = {
        ("abu", 5): {"q": 0.3, "r": 0.1, "only pooled": 9.0},
        ("clip", 5): {"q": 0.2, "r": 0.5, "only pooled": 9.0},
        ("random", 5): {"q": 0.1, "r": 0.2, "only pooled": 0.0},
        ("alone", 5): {"q": 7.0, "r": 7.0},
        ("another seed", 0): {"q": 7.0, "r": 7.0},
        ("abu", 20): {"q": 7.0, "r": 7.0},
    }
    single = {
        ("abu", 5): {"r": 0.2, "q": 0.6},
        ("clip", 5): {"r": 0.15, "q": 0.5},
        ("random", 5): {"r": 0.4, "q": 0.2},
    }
    folders = [write(tmp_path / name, rows) for name, rows in (("pooled", pooled), ("single", single))]
    (result,) = protocols.agreements(*(protocols.read_effects(folder)[0] for folder in folders))
    assert (result.k, result.methods, result.queries) == (5, ("abu", "clip", "random"), ("q", "r"))
    assert result.kendall == pytest.approx([1.0, kendalltau([0.1, 0.5, 0.2], [0.2, 0.15, 0.4]).statistic])
    assert result.kendall[1] == pytest.approx(-1 / 3)
    assert result.spearman == pytest.approx([1.0, -0.5])
    means = [0.2, 0.35, 0.15], [0.4, 0.325, 0.3]
    assert result.mean_kendall == pytest.approx(kendalltau(*means).statistic)
    assert result.mean_spearman == pytest.approx(spearmanr(*means).statistic)
    flat = [0.3, 0.2, 0.1, 0.1, 0.5, 0.2], [0.6, 0.5, 0.2, 0.2, 0.15, 0.4]
    assert result.pearson == pytest.approx(pearsonr(*flat).statistic)
    assert result.rank_correlation == pytest.approx(spearmanr(*flat).statistic)
    protocols.main([str(folders[0]), str(folders[1] / "counterfactual.json")])
    printed = capsys.readouterr().out
    assert "| a cat | -0.33 | -0.50 |" in printed
    assert "Kendall 0.33 ± 0.67 (n = 2 queries)" in printed
    assert "(n = 6 pairs)" in printed


def test_an_evaluation_agrees_with_itself_and_not_with_its_reverse() -> None:
    random = np.random.default_rng(0)
    queries = [f"query {index}" for index in range(5)]
    effects = {3: {name: dict(zip(queries, random.normal(size=5), strict=True)) for name in ("a", "b", "c", "d")}}
    turned = {3: {name: {query: -value for query, value in own.items()} for name, own in effects[3].items()}}
    for other, sign in ((effects, 1.0), (turned, -1.0)):
        (result,) = protocols.agreements(effects, other)
        numbers = [*result.kendall, *result.spearman, result.mean_kendall, result.mean_spearman, result.pearson]
        assert numbers == pytest.approx([sign] * len(numbers))


def test_equal_effects_have_no_order() -> None:
    effects = {1: {"a": {"q": 1.0}, "b": {"q": 1.0}}}
    (result,) = protocols.agreements(effects, {1: {"a": {"q": 1.0}, "b": {"q": 2.0}}})
    assert np.isnan(result.kendall[0])


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    effects = {1: {"a": {"q": 1.0}, "b": {"q": 2.0}}}
    for other, message in (
        ({2: effects[1]}, r"share no K: \[1\] and \[2\]"),
        ({1: {"a": {"q": 1.0}}}, "at least two methods"),
        ({1: {"a": {"x": 1.0}, "b": {"x": 2.0}}}, "share no query"),
    ):
        with pytest.raises(ValueError, match=message):
            protocols.agreements(effects, other)
    with pytest.raises(ValueError, match="is missing: run"):
        protocols.read_effects(tmp_path / "nowhere")
    (tmp_path / "counterfactual.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks 'prompts'"):
        protocols.read_effects(tmp_path)
