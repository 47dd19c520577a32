"""Requests: flags over a small YAML file, which prompt belongs to which image, and folders that are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from wherefrom.cli.run_file import RECORD, Request, claim, completed, parse_settings, read_request, record_of
from wherefrom.cli.run_flags import request_of, run_parser


def request(*words: str) -> Request:
    return request_of(run_parser("attribute", "line", "example").parse_args(list(words)))


def written(path: Path, tree: Any) -> Path:
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.png").write_bytes(b"one")
    return completed(request("--model", "owner/model", "--images", "images", "--query", "q.png", "--prompt", "a fox"))


@pytest.mark.parametrize(
    ("words", "queries"),
    [
        ("--query a --prompt x", [{"image": "a", "prompt": "x"}]),
        ("--query a", [{"image": "a"}]),
        ("--prompt x", [{"prompt": "x"}]),
        ("--prompt x --query a", [{"prompt": "x"}, {"image": "a"}]),
        ("--query a --query b --prompt y", [{"image": "a"}, {"image": "b", "prompt": "y"}]),
        ("--query a --prompt x --prompt y", [{"image": "a", "prompt": "x"}, {"prompt": "y"}]),
        (
            "--query a --prompt x --query b --prompt y",
            [{"image": "a", "prompt": "x"}, {"image": "b", "prompt": "y"}],
        ),
        ("--query a --seed 3 --prompt x", [{"image": "a", "prompt": "x"}]),
    ],
)
def test_a_prompt_belongs_to_the_query_just_before_it(words: str, queries: list[dict[str, str]]) -> None:
    assert list(request(*words.split()).queries) == queries


def test_an_empty_prompt_says_that_it_is_not_known() -> None:
    assert request("--query", "a", "--prompt", "").queries == ({"image": "a", "prompt": ""},)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    tree = {
        "model": "m",
        "images": "i",
        "queries": [{"image": "a.png", "prompt": "x"}, {"prompt": "y"}],
        "method": "trak",
        "settings": {"unlearning": {"noise_samples": 5, "steps": 2}},
        "seed": 3,
        "guidance": 4,
        "quick": True,
    }
    file = str(written(tmp_path / "run.yaml", tree))
    plain = request("-c", file)
    assert (plain.model, plain.method, plain.seed, plain.quick) == ("m", ("trak",), 3, True)
    assert plain.guidance == 4.0
    assert isinstance(plain.guidance, float)
    assert plain.queries == ({"image": "a.png", "prompt": "x"}, {"prompt": "y"})
    assert plain.settings == {"unlearning.noise_samples": 5, "unlearning.steps": 2}
    over = request("-c", file, "--method", "abu", "--seed", "4", "--set", "unlearning.steps=1", "--prompt", "z")
    assert (over.model, over.method, over.seed) == ("m", ("abu",), 4)
    assert over.settings == {"unlearning.noise_samples": 5, "unlearning.steps": 1}
    assert over.queries == ({"prompt": "z"},)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"modle": "m"}, "there is no key 'modle'; did you mean 'model'?"),
        ({"zzz": 1}, "there is no key 'zzz'; there are model, "),
        ({"seed": "one"}, "seed takes a whole number; given 'one'"),
        ({"seed": True}, "seed takes a whole number; given True"),
        ({"quick": 1}, "quick takes true or false; given 1"),
        ({"model": 5}, "model takes a text; given 5"),
        ({"settings": 5}, "settings takes a mapping"),
        ({"queries": "a fox"}, "queries takes a list of mappings; given 'a fox'"),
        ({"queries": [{"file": "a.png"}]}, "queries have no key 'file'; there are image, prompt."),
        ({"queries": [{"imge": "a.png"}]}, "queries have no key 'imge'; did you mean 'image'?"),
        ({"queries": [{"prompt": 5}]}, "prompt of queries takes a text; given 5"),
        ({"queries": [{}]}, "a query has an image, a prompt, or both"),
        ({"regions": [{"box": [0, 0, 1, 1]}]}, "a region says what it is a part `of`"),
        ({"method": [1]}, "method takes a list of texts"),
        ("model: [", "is not valid YAML"),
        ("- a\n", "holds no keys"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path: Path, tree: Any, said: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  matched below, where no character is special
        read_request(written(tmp_path / "run.yaml", tree))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_settings_are_values_as_in_yaml() -> None:
    assert parse_settings(["a.b=5", "c=null", "d=x", "e={f: 1.5}"]) == {"a.b": 5, "c": None, "d": "x", "e": {"f": 1.5}}
    for word in ("a", "=5"):
        with pytest.raises(ValueError, match="--set takes key=value"):
            parse_settings([word])
    with pytest.raises(ValueError, match=r"--set a: '\[' is no value"):
        parse_settings(["a=["])


def test_the_folder_is_readable_and_another_one_for_other_settings(asked: Request) -> None:
    first = Path(asked.output)
    assert first.parent == Path("wherefrom-runs")
    assert first.name.startswith("abu_plus-q-")
    words = ["--model", "owner/model", "--images", "images", "--query", "q.png", "--prompt", "a fox"]
    assert completed(request(*words)).output == asked.output
    others = [
        ["--seed", "1"],
        ["--quick"],
        ["--set", "a=1"],
        ["--method", "trak"],
        ["--prompt", "another"],
        ["--resize"],
        ["--top", "5"],
    ]
    folders = [completed(request(*words, *more)).output for more in others]
    assert len({asked.output, *folders}) == len(others) + 1
    # What decides nothing does not change it.
    assert completed(request(*words, "--device", "cpu", "--store", "elsewhere")).output == asked.output
    # What a file holds does.
    Path("q.png").write_bytes(b"two")
    assert completed(request(*words)).output != asked.output


def test_a_run_is_repeated_by_its_record(asked: Request, tmp_path: Path) -> None:
    folder = claim(asked, write=True)
    again = completed(request("-c", str(folder / RECORD)))
    assert record_of(again) == record_of(asked)
    assert again.output == asked.output
    claim(again, write=True)


def test_a_folder_of_another_run_is_refused_and_the_difference_named(asked: Request, tmp_path: Path) -> None:
    words = ["--model", "owner/model", "--images", "images", "--query", "q.png", "--prompt", "a fox"]
    mine = completed(request(*words, "--output", "mine"))
    claim(mine, write=True)
    other = completed(request(*words, "--output", "mine", "--seed", "5", "--method", "trak"))
    with pytest.raises(ValueError, match="--output mine holds another run") as raised:
        claim(other, write=False)
    assert "method is ['abu_plus'] there and ['trak'] here; seed is not given there and 5 here" in str(raised.value)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    for place in ("taken", "taken/thesis.txt"):
        with pytest.raises(ValueError, match="exists and holds no run of this command"):
            claim(completed(request(*words, "--output", place)), write=True)
    (tmp_path / "empty").mkdir()
    claim(completed(request(*words, "--output", "empty")), write=True)
    assert (tmp_path / "empty" / RECORD).is_file()
