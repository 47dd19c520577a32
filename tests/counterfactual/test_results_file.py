"""Results files: those of an earlier release are read as if they had today's keys, with the same numbers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.evaluations import evaluated
from wherefrom.counterfactual.effect_table import CounterfactualRow, as_table
from wherefrom.counterfactual.report import write_counterfactual_report
from wherefrom.counterfactual.results_file import COUNTERFACTUAL, read_results

COMMITTED = Path(__file__).parents[2] / "results" / "emoji" / "judge"
FILES = ("alternatives", "counterfactual", "counterfactual_before_tuning", "single", "weights")
SCORES = ("lds", "lds_before_tuning", "tuning")
BEFORE = {"own", "others", "equivalent", "synergy", "greedy", "not_greedy", "pools", "ladder", "ladder_draws"}
BEFORE |= {"training_pictures", "foresight", "halves", "shown"}


def numbers(value: Any) -> Iterator[float | None]:
    """All numbers of a JSON document, in no order."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)
    elif value is None or isinstance(value, int | float):
        yield value


def keys(value: Any) -> set[str]:
    """All keys of a JSON document, wherever they stand, but for ids."""
    if isinstance(value, dict):
        return {key for key in value if "/" not in key}.union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("name", [*FILES, *SCORES])
def test_committed_results_have_todays_keys_and_their_own_numbers(name: str) -> None:
    path = COMMITTED / f"{name}.json"
    stored, result = json.loads(path.read_text()), read_results(path)
    assert sorted(map(repr, numbers(stored))) == sorted(map(repr, numbers(result)))
    assert not keys(result) & BEFORE
    methods = {row["method"] for row in result["rows"]}
    assert ("another seed" in methods) == (name == "lds"), "the ceiling of the linear datamodeling score keeps its name"


@pytest.mark.parametrize("name", FILES)
def test_committed_rows_are_those_of_the_table(name: str) -> None:
    path = COMMITTED / f"{name}.json"
    stored, result = json.loads(path.read_text())["rows"], read_results(path)["rows"]
    rows = [CounterfactualRow.from_json(each) for each in result]
    assert [row.as_json() for row in rows] == result
    lines = as_table(rows).splitlines()[2:]
    for line, row in zip(lines, stored, strict=True):
        values = [value for value in row["loss"]["own"] if value is not None]
        assert re.search(rf"\| {row['k']} \| {row['removed']:.0f} \| {len(values)} \| ", line)
        assert f"| {sum(values) / len(values):.3g} ± " in line
    baseline = [row.method for row in rows if row.k == 0]
    assert baseline == ["seed-variance baseline"] * (len(read_results(path)["protocol"]["seeds"]) > 1)


def test_todays_results_are_read_as_they_are(tmp_path: Path) -> None:
    result = evaluated(tmp_path)
    assert read_results(tmp_path / COUNTERFACTUAL) == result


def test_the_page_of_an_earlier_releases_run(tmp_path: Path) -> None:
    shutil.copy(COMMITTED / "alternatives.json", tmp_path / COUNTERFACTUAL)
    page = write_counterfactual_report(tmp_path)[0].read_text()
    for title in ("Which differences between methods", "Additivity", "Iterative removal", "Re-attribution"):
        assert f"<h2>{title}" in page


def test_what_is_no_table_of_results_is_refused(tmp_path: Path) -> None:
    for content, message in (
        ("[]", "is not a table of results"),
        ('{"rows": [{"loss": {}}]}', "not a table of results"),
    ):
        (tmp_path / COUNTERFACTUAL).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_results(tmp_path / COUNTERFACTUAL)
    with pytest.raises(ValueError, match=r"lds\.json is missing: run evaluate\.py lds with this output first"):
        read_results(tmp_path / "lds.json")
