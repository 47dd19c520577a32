"""Several methods side by side, through the command line and in numbers."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import evaluate
from tests.support.tiny import attribution_config, tiny_latents
from wherefrom.attributors import (
    TRAK,
    AttributionByUnlearning,
    InfluenceBank,
    InfluenceFunction,
    Magnitude,
    Query,
    Random,
    Rerank,
    Scores,
    TrainingData,
)
from wherefrom.commands.compare import compare
from wherefrom.commands.method_files import load_methods
from wherefrom.rankings.ranking_file import read_ranking
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.measured_cost import track_peak_memory

ROOT = Path(__file__).parents[2]
NAMES = tuple(f"id {index}" for index in range(6))


def scores(values: list[float]) -> Scores:
    return Scores(Query("q", "p", np.zeros((2, 2, 3), dtype=np.uint8)), NAMES, np.array(values), np.zeros(0))


def test_memory_is_watched() -> None:
    gc.collect()  # what earlier tests left would be given back meanwhile
    with track_peak_memory() as largest:
        before = largest[0]
        kept = np.ones(50_000_000)
        assert kept.sum() > 0
    assert largest[0] - before > 100_000_000


def test_methods_are_compared_through_the_command_line(tmp_path: Path) -> None:
    content = yaml.safe_load(attribution_config(tmp_path).read_text())
    abu = content.pop("attributor")
    for name, attributor in (("abu", abu), ("pixel", {"class_path": "PixelSimilarity"}), ("the_same", abu)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(attributor))
    methods = ["abu", "pixel", "the_same"]
    content |= {"methods": [f"{name}.yaml" for name in methods], "output": str(tmp_path / "compared")}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content))
    evaluate.main(["compare", "-c", str(tmp_path / "compare.yaml")])
    output = tmp_path / "compared"
    table = pq.read_table(output / "methods.parquet").to_pydict()
    assert table["method"] == methods
    assert all(value > 0 for value in table["seconds_per_query"] + table["peak_memory_bytes"])
    stored = table["stored_bytes"]
    assert stored[0] > stored[1] > 0
    assert stored[2] == pytest.approx(stored[0], rel=0.01), "what it needs counts, though another method has made it"
    assert np.isfinite(table["split_half_reliability"][0])
    assert np.isnan(table["split_half_reliability"][1])
    rankings = [read_ranking(output / name) for name in methods]
    assert set(rankings[0]) == set(rankings[1]) == set(rankings[2])
    rows = pq.read_table(output / "correlations.parquet").to_pylist()
    assert [(row["method"], row["other"]) for row in rows] == [(a, b) for a in methods for b in methods]
    assert rows[1]["spearman"] == rows[3]["spearman"]
    assert rows[2]["spearman"] == pytest.approx(1), "the same method agrees with itself"
    page = (output / "report.html").read_text()
    for words in ("What each costs", "How far they agree", "abu", "pixel", "a big red square"):
        assert words in page
    evaluate.main(["compare", "-c", str(tmp_path / "compare.yaml")])
    again = pq.read_table(output / "methods.parquet").to_pydict()
    for column in ("seconds_per_query", "stored_bytes", "peak_memory_bytes"):
        assert again[column] == table[column]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    train = tiny_latents(4).images
    query = Query("q", "p", np.zeros((8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="There are no methods to compare"):
        compare(
            tmp_path,
            methods={},
            data=TrainingData(train),
            model=None,
            queries=[query],
            store=Store(tmp_path / "store"),
            runner=Runner.current(),
        )
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "random.yaml").write_text("class_path: Random\n")
    with pytest.raises(ValueError, match="Two attributor files are called 'random'"):
        load_methods([tmp_path / "a" / "random.yaml", tmp_path / "b" / "random.yaml"])
    assert isinstance(load_methods([tmp_path / "a" / "random.yaml"])["random"], Random)
    files = [ROOT / "configs" / "attributor" / f"{name}.yaml" for name in ("random", "influence")]
    changed = load_methods(files, {"grid.timesteps": 3, "noise_samples": 7}, strict=True)["influence"]
    assert isinstance(changed, InfluenceFunction)
    assert (changed.grid.timesteps, changed.noise_samples) == (3, 7)
    names = ("abu_plus_rerank_bank", "abu_plus_magnitude")
    asking = [ROOT / "configs" / "attributor" / f"{name}.yaml" for name in names]
    nested = load_methods(asking, {"grid.timesteps": 3, "unlearning.noise_samples": 7}, strict=True)
    assert isinstance(nested["abu_plus_rerank_bank"], Rerank)
    assert isinstance(nested["abu_plus_magnitude"], Magnitude)
    reranked, sized = nested["abu_plus_rerank_bank"], nested["abu_plus_magnitude"]
    for each in (reranked.method, reranked.nearest, sized.method):
        assert isinstance(each, AttributionByUnlearning | InfluenceBank)
        assert each.grid.timesteps == 3
        assert not isinstance(each, AttributionByUnlearning) or each.unlearning.noise_samples == 7
    for own in ({"influence/noise_samples": 9, "noise_samples": 7}, {"noise_samples": 7, "influence/noise_samples": 9}):
        made = load_methods([*files, ROOT / "configs" / "attributor" / "trak.yaml"], own, strict=True)
        influence, trak = made["influence"], made["trak"]
        assert isinstance(influence, InfluenceFunction)
        assert isinstance(trak, TRAK)
        assert (influence.noise_samples, trak.noise_samples) == (9, 7), "one method's own setting"
    with pytest.raises(ValueError, match=r"settings: no method has 'random/noise_samples'"):
        load_methods(files, {"random/draws": 3}, strict=True)
    with pytest.raises(ValueError, match=r"settings: no method has 'grid.timestep'; the methods are random, influence"):
        load_methods(files, {"grid.timestep": 3}, strict=True)


def test_a_variant_is_one_of_the_methods_with_settings_of_its_own() -> None:
    files = [ROOT / "configs" / "attributor" / f"{name}.yaml" for name in ("trak", "abu_plus", "abu_plus_magnitude")]
    settings = {"grid.timesteps": 3, "trak/relative_lambda": 2.0}
    variants = {
        "softer": {"trak/relative_lambda": 4.0, "trak/noise_samples": 9},
        "larger": {"abu_plus_magnitude/unlearning.relative_loss_increase": 3.0},
    }
    made = load_methods(files, settings, variants, strict=True)
    assert list(made) == ["trak", "abu_plus", "abu_plus_magnitude", "softer", "larger"]
    trak, softer, larger, alone = made["trak"], made["softer"], made["larger"], made["abu_plus"]
    assert isinstance(trak, TRAK)
    assert isinstance(softer, TRAK)
    assert (trak.relative_lambda, softer.relative_lambda) == (2.0, 4.0)
    assert softer.noise_samples == 9 != trak.noise_samples
    assert softer.grid.timesteps == trak.grid.timesteps == 3, "the settings of all hold for variants"
    assert isinstance(larger, Magnitude)
    assert isinstance(larger.method, AttributionByUnlearning)
    assert isinstance(alone, AttributionByUnlearning)
    assert (alone.unlearning.relative_loss_increase, larger.method.unlearning.relative_loss_increase) == (0.2, 3.0)
    for name, changes in (
        ("trak", {"trak/noise_samples": 9}),
        ("nobody", {"noise_samples": 9}),
        ("nobody", {"random/draws": 9}),
        ("nobody", {}),
        ("../up", {"trak/noise_samples": 9}),
        ("both", {"trak/noise_samples": 9, "abu_plus/fisher.samples_per_image": 1}),
    ):
        with pytest.raises(
            ValueError, match=rf"variants: '{name}' needs a name of its own, without slashes, and settings"
        ):
            load_methods(files, {}, {name: changes})
    with pytest.raises(ValueError, match="variants: 'softer' has no 'trak/lambda'"):
        load_methods(files, {}, {"softer": {"trak/lambda": 9}}, strict=True)
