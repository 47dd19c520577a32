"""Old names of settings and classes: in files, in values, in flags; with one line of warning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.tiny import tiny_ranker
from wherefrom.attributors import InfluenceFunction, LearnedRanker, Magnitude, Rerank
from wherefrom.commands.method_files import load_methods
from wherefrom.runtime.renamed_settings import (
    CLASSES,
    KEYS,
    accepting_old_names,
    class_now,
    renamed,
    renamed_words,
)

# As an experiment was written for the release before.
OLD_EXPERIMENT = {
    "model": "weights/emoji",
    "data": {"class_path": "Emoji", "init_args": {"batch_size": 32}},
    "attributor": {
        "class_path": "wherefrom.attributors.by_size.BySize",
        "init_args": {
            "method": {
                "class_path": "AttributionByUnlearning",
                "init_args": {
                    "unlearning": {"steps": 1, "draws": 8, "measure_draws": 9, "rise": 0.5},
                    "fisher": {"visits": 3},
                },
            }
        },
    },
    "queries": {"pictures": [{"file": "a.png", "prompt": "a fox"}]},
    "settings": {"unlearning.rise": 1.0, "abu/fisher.visits": 2, "trak/draws": 9},
    "variants": {"many_draws": {"trak/draws": 90}},
    "output": "runs/old",
}


def test_every_old_name_of_an_experiment_becomes_the_one_of_today() -> None:
    now, changes = renamed(OLD_EXPERIMENT)
    method = now["attributor"]["init_args"]["method"]["init_args"]
    assert now["attributor"]["class_path"] == "wherefrom.attributors.magnitude.Magnitude"
    assert method["unlearning"] == {
        "steps": 1,
        "noise_samples": 8,
        "measurement_samples": 9,
        "relative_loss_increase": 0.5,
    }
    assert method["fisher"] == {"samples_per_image": 3}
    assert now["queries"] == {"images": [{"file": "a.png", "prompt": "a fox"}]}
    assert now["settings"] == {
        "unlearning.relative_loss_increase": 1.0,
        "abu/fisher.samples_per_image": 2,
        "trak/noise_samples": 9,
    }
    assert now["variants"] == {"many_draws": {"trak/noise_samples": 90}}
    assert {old for old, _ in changes} >= {"draws", "measure_draws", "rise", "visits", "pictures", "trak/draws"}
    again, none = renamed(now)
    assert again == now
    assert none == []


def test_a_value_that_was_renamed_with_its_key() -> None:
    for old, new in ((True, "skip"), ("true", "skip"), (False, "stop")):
        now, changes = renamed({"data": {"init_args": {"options": {"skip_unreadable": old}}}})
        assert now == {"data": {"init_args": {"options": {"on_error": new}}}}
        assert changes == [("skip_unreadable", "on_error")]
    for words in (
        ["--data.init_args.options.skip_unreadable", "true"],
        ["--data.init_args.options.skip_unreadable=true"],
    ):
        now_words, _ = renamed_words(words)
        assert "=".join(now_words) == "--data.init_args.options.on_error=skip"
    with pytest.raises(ValueError, match="'on_error' is given twice"):
        renamed({"options": {"skip_unreadable": True, "on_error": "stop"}})


def test_names_mean_something_only_where_they_did() -> None:
    content = {"data": {"init_args": {"visits": 3, "pictures": 4}}, "prompts": ["rise", "draws"]}
    assert renamed(content) == (content, [])


def test_a_file_of_one_group_is_read_as_that_group() -> None:
    now, _ = renamed({"sampling_steps": 50, "pictures": [{"file": "a.png", "prompt": ""}]})
    assert set(now) == {"sampling_steps", "images"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Fast", "LearnedRanker"),
        ("wherefrom.attributors.Fast", "wherefrom.attributors.LearnedRanker"),
        ("wherefrom.attributors.fast.Fast", "wherefrom.attributors.learned_ranker.LearnedRanker"),
        ("wherefrom.attributors.among.AmongNearest", "wherefrom.attributors.rerank.Rerank"),
        ("wherefrom.muon.MuonAdamW", "wherefrom.training.muon.MuonAdamW"),
        ("wherefrom.features.MiniLMEncoder", "wherefrom.features.base.MiniLMEncoder"),
        ("wherefrom.parts.LatentEncoder", "wherefrom.models.encoders.LatentEncoder"),
        ("torch.optim.AdamW", "torch.optim.AdamW"),
        ("Emoji", "Emoji"),
    ],
)
def test_classes(old: str, new: str) -> None:
    assert class_now(old) == new


def test_old_and_new_name_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'noise_samples' is given twice, also by its old name 'draws'"):
        renamed({"unlearning": {"draws": 3, "noise_samples": 4}})
    with pytest.raises(ValueError, match=r"--a.noise_samples is given twice, also by its old name --a.draws"):
        renamed_words(["--a.draws", "3", "--a.noise_samples", "4"])


def test_words_of_a_command_line() -> None:
    words = ["attribute", "--attributor", "Fast", "--attributor.init_args.fisher.visits=3", "--queries.pictures"]
    words += ['[{file: a.png, prompt: ""}]', "--settings", "{abu/unlearning.rise: 2}", "--queries.prompts", '["rise"]']
    now, changes = renamed_words(words)
    assert now[:4] == [
        "attribute",
        "--attributor",
        "LearnedRanker",
        "--attributor.init_args.fisher.samples_per_image=3",
    ]
    assert now[4:6] == ["--queries.images", '[{file: a.png, prompt: ""}]']
    assert json.loads(now[7]) == {"abu/unlearning.relative_loss_increase": 2}
    assert now[8:] == ["--queries.prompts", '["rise"]']
    assert len(changes) == 4


def test_methods_of_old_files_are_those_of_today_and_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    influence = {"class_path": "InfluenceFunction", "init_args": {"draws": 7, "grid": {"timesteps": 2}}}
    unlearning = {
        "class_path": "AttributionByUnlearning",
        "init_args": {"unlearning": {"draws": 8, "rise": 0.5}, "fisher": {"visits": 3}},
    }
    ranker = {"class_path": "Fast", "init_args": {"ranker": str(tiny_ranker(tmp_path / "ranker", {"minilm": 384}))}}
    files = {
        "influence": influence,
        "among": {
            "class_path": "AmongNearest",
            "init_args": {"method": unlearning, "nearest": {"class_path": "PixelSimilarity"}, "k": 2},
        },
        "size": {"class_path": "wherefrom.attributors.by_size.BySize", "init_args": {"method": unlearning}},
    }
    paths = []
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
        paths.append(tmp_path / f"{name}.yaml")
    with accepting_old_names([str(path) for path in paths]):
        made = load_methods(paths, {"influence/draws": 5}, strict=True)
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 1
    assert all(str(path) in warned[0] for path in paths)
    assert "draws → noise_samples" in warned[0]
    assert "AmongNearest → Rerank" in warned[0]
    assert isinstance(made["influence"], InfluenceFunction)
    assert made["influence"].noise_samples == 5
    assert isinstance(made["among"], Rerank)
    assert isinstance(made["size"], Magnitude)
    assert class_now(str(ranker["class_path"])) == LearnedRanker.__name__
    load_methods([tmp_path / "influence.yaml"])
    assert capsys.readouterr().err.count("warning: old names") == 1, "also from Python alone"


def test_a_file_with_both_names_is_refused_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "both.yaml"
    file.write_text(json.dumps({"class_path": "InfluenceFunction", "init_args": {"draws": 7, "noise_samples": 7}}))
    with pytest.raises(SystemExit):
        load_methods([file])
    assert f"{file}: 'noise_samples' is given twice, also by its old name 'draws'" in capsys.readouterr().err


def test_no_old_name_is_a_new_one() -> None:
    assert not {old for _, old in KEYS} & set(KEYS.values())
    assert not set(CLASSES) & set(CLASSES.values())
