"""Committed records are found by today's scripts, whatever settings and files are called by now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import cross_style_counterparts, method_table, ranker_table, scaling
from experiments.support.arguments import add_images, add_noise_samples, add_samples_per_image, script_parser
from experiments.support.markdown import markdown_table, mean_and_error
from experiments.support.methods import load_method, quick_settings
from experiments.support.records import experiment_identity, plain_options, read_record, recorded_settings

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "results" / "emoji"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [name for name in method_table.METHODS if name != "caption"])
def test_every_method_of_the_table_is_found(method: str) -> None:
    record = read_record(EMOJI / "method_table.json")
    shared = {name: record[name] for name in ("model", "decoder", "queries")}
    known = record["methods"][method]
    settings = quick_settings(timesteps=5, noise_samples=1000, samples_per_image=2)
    attributor = load_method(method, settings)
    assert json.loads(json.dumps(attributor.identity())) == known["attributor"]
    some = None if known["pictures"] == 3132 else 500  # methods whose passes take long scored a part
    assert method_table.row_identity(shared, attributor, some) == known["identity"]


def test_rankers_that_were_measured_are_not_trained_again() -> None:
    record = read_record(EMOJI / "ranker_table.json")
    identity = experiment_identity(ROOT / ranker_table.EXPERIMENT)
    made_of = {**record["made_of"], "steps": 400, "experiment": identity}
    assert ranker_table.kept_rows(record, made_of) == record["rows"]
    measured = set(ranker_table.variants()) - {"teacher: looks"}  # whose teacher set was not made
    assert measured == set(record["rows"])
    assert ranker_table.kept_rows(record, {**made_of, "steps": 300}) == {}
    assert ranker_table.kept_rows({}, made_of) == {}
    assert ranker_table.kept_rows({"made_of": made_of, "rows": {"a": {}}}, made_of) == {"a": {}}


def test_sizes_that_were_measured_are_not_trained_again() -> None:
    rows = read_record(EMOJI / "scaling.json")["rows"]
    wanted = [(scaling.BASE_WIDTHS, True, images, 16) for images in (500, 2000, 6000, 20000)]
    wanted += [(scaling.BASE_WIDTHS, True, images, 48) for images in (500, 2000)]
    wanted += [(widths, False, 500, 100) for widths in ((16, 24), (24, 32), (48, 64))]
    settings = recorded_settings(scaling.method_settings(timesteps=5, noise_samples=500))
    for widths, base, images, visits in wanted:
        assert rows[scaling.row_name(widths, base=base, images=images, visits=visits)]["asked"]["settings"] == settings
    assert len(rows) == len(wanted)


@pytest.mark.parametrize("name", ["twins.json", "twins_tuning.json"])
def test_records_of_counterparts_keep_their_words(name: str) -> None:
    for ranks in read_record(EMOJI / name)["ranks"].values():
        assert set(ranks) == set(cross_style_counterparts.KINDS.values())
    assert (ROOT / cross_style_counterparts.RESULT).exists()


def test_options_of_earlier_releases_are_understood() -> None:
    parser = script_parser("What it is.")
    add_images(parser, default=3)
    add_noise_samples(parser, 5)
    add_samples_per_image(parser, 7)
    assert vars(parser.parse_args([])) == {"images": 3, "noise_samples": 5, "samples_per_image": 7}
    old, new = ("--pictures", "--draws", "--visits"), ("--images", "--noise-samples", "--samples-per-image")
    for names in (old, new):
        words = [word for number, name in enumerate(names) for word in (name, str(number))]
        assert vars(parser.parse_args(words)) == {"images": 0, "noise_samples": 1, "samples_per_image": 2}


def test_records_that_are_not_there_are_empty_and_options_are_json(tmp_path: Path) -> None:
    assert read_record(tmp_path / "none.json") == {}
    assert plain_options({"a": Path("b"), "c": [1], "d": None}, "d") == {"a": "b", "c": [1]}
    assert recorded_settings({"unlearning.noise_samples": 1, "grid.flips": False}) == {
        "unlearning.draws": 1,
        "grid.flips": False,
    }


def test_tables_in_markdown() -> None:
    table = markdown_table(["a", "b"], [["1", "2"], ["3", mean_and_error([1.0, 2.0, 3.0])]])
    assert table.splitlines() == ["| a | b |", "|---|---|", "| 1 | 2 |", "| 3 | 2.000 ± 0.577 |"]
    assert markdown_table(["a"], []) == "| a |\n|---|"
    with pytest.raises(ValueError, match="2 cells, and there are 1 titles"):
        markdown_table(["a"], [["1", "2"]])
