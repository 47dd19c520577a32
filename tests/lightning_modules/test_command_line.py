"""The command lines: help without waiting, folders that are safe, old experiments that still run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

import evaluate
import train
from lightning_modules.launch.command_line import PARSED, parse
from lightning_modules.launch.committed import CHECKOUT, refuse_committed
from lightning_modules.launch.settings import RunSettings
from tests.support.tiny import attribution_config, tiny_folder, tiny_pipeline, training_config
from wherefrom.runtime.artifacts import ArtifactMismatchError

ROOT = Path(__file__).parents[2]
LIGHT = """
import sys
import evaluate
try:
    evaluate.main(sys.argv[1:])
except SystemExit:
    pass
print(sorted({"torch", "lightning", "transformers", "wandb"} & set(sys.modules)), file=sys.stderr)
"""
COMMAND = re.compile(r"^#?\s*(python (?:evaluate|train)\.py .*)$")


@pytest.mark.parametrize("words", [["--help"], [], ["-h"], ["nonsense"], ["budget", "--help"]], ids=" ".join)
def test_help_waits_for_no_library(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_help_has_a_line_for_each_command_and_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for command in evaluate.COMMANDS:
        (line,) = [each for each in lines if each.startswith(f"  {command} ")]
        assert len(line.split(maxsplit=1)[1]) > 20
        assert any(each.startswith(f"  python evaluate.py {command} ") for each in lines)
    assert set(evaluate.COMMANDS) == {*PARSED, "budget"}
    assert set(evaluate.COMMANDS) == {file.stem for file in evaluate.FOLDER.glob("[!_]*.py")}


def printed_commands() -> list[list[str]]:
    """Words of every command that the help and the experiments print, lines that end in a backslash joined."""
    texts = [evaluate.usage(), *(file.read_text() for file in sorted((ROOT / "configs" / "experiment").glob("*.yaml")))]
    found: list[list[str]] = []
    for text in texts:
        for line in re.sub(r"\\\n#?\s*", " ", text).splitlines():
            match = COMMAND.match(line.strip())
            words = shlex.split(match[1], comments=True)[1:] if match else []
            if "-c" in words or "--output" in words:
                found.append(words)
    return found


def test_every_printed_command_has_a_folder_of_its_own() -> None:
    where: dict[str, set[str]] = {}
    for words in printed_commands():
        if words[1] in ("budget", "report"):
            continue
        if "--output" in words:
            folder = words[words.index("--output") + 1]
        else:
            content = yaml.safe_load((ROOT / words[words.index("-c") + 1]).read_text())
            folder = content["output"] if "output" in content else content["trainer"]["default_root_dir"]
        where.setdefault(folder, set()).add(shlex.join(words))
    assert len(where) > 30
    assert {folder: commands for folder, commands in where.items() if len(commands) > 1} == {}


def test_experiments_write_below_runs() -> None:
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        for place in re.findall(
            r"\b(?:save_to|(?<!_)output|dirpath|save_dir|default_root_dir): ([^\s}]+)", file.read_text()
        ):
            assert place.startswith("runs/"), (file.name, place)


def test_folders_of_the_experiments_are_distinct() -> None:
    contents = [yaml.safe_load(file.read_text()) for file in (ROOT / "configs" / "experiment").glob("*.yaml")]
    places = Counter(each["output"] if "output" in each else each["trainer"]["default_root_dir"] for each in contents)
    assert max(places.values()) == 1


@pytest.mark.parametrize("below", ["weights", "results"])
def test_committed_folders_are_written_only_by_a_flag(below: str, tmp_path: Path) -> None:
    place = CHECKOUT / below / "here"
    with pytest.raises(ArtifactMismatchError, match=rf"overwrite what is committed in {below}/.*--results"):
        refuse_committed(place, "results", ["--results"], ["lds", "-c", "x.yaml"])
    refuse_committed(place, "results", ["--results"], ["lds", "--results", str(place)])
    refuse_committed(place, "results", ["--results"], ["lds", f"--results={place}"])
    refuse_committed(tmp_path / below, "results", ["--results"], [])
    refuse_committed(None, "results", ["--results"], [])


def test_a_training_leaves_committed_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = training_config(tmp_path, steps=2)
    content = json.loads(config.read_text())
    content["model"]["init_args"]["save_to"] = str(CHECKOUT / "weights" / "not there")
    config.write_text(json.dumps(content))
    with pytest.raises(ArtifactMismatchError, match=r"save_to is .*--weights"):
        train.main(["fit", "-c", str(config)])
    assert not (CHECKOUT / "weights" / "not there").exists()
    assert not list((tmp_path / "run").glob("**/*.ckpt"))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_the_flag_for_weights_is_for_one_run_only(tmp_path: Path) -> None:
    config = training_config(tmp_path, steps=8)
    train.main(["fit", "-c", str(config), "--weights", str(tmp_path / "asked")])
    assert (tmp_path / "asked" / "unet").is_dir()
    (saved,) = (tmp_path / "run").rglob("config.yaml")
    assert "weights" not in yaml.safe_load(saved.read_text())
    assert yaml.safe_load(saved.read_text())["model"]["init_args"]["save_to"] == str(tmp_path / "asked")


def test_a_collision_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    config = attribution_config(tmp_path, attributor={"class_path": "PixelSimilarity"})
    evaluate.main(["attribute", "-c", str(config)])
    words = ["attribute", "-c", str(config), "--store", str(tmp_path / "no store"), "--queries.sampling_steps", "3"]
    with pytest.raises(ArtifactMismatchError) as caught:
        evaluate.main(words)
    assert "  queries.sampling_steps: on disk 2, asked for 3" in str(caught.value).splitlines()
    assert not (tmp_path / "no store").exists(), "nothing was decoded"
    with pytest.raises(ArtifactMismatchError, match=r"methods\.attributor\.method: on disk .*, asked for"):
        evaluate.main(["attribute", "-c", str(config), "--attributor", "Random"])
    evaluate.main(["attribute", "-c", str(config), "--report.top", "3"])


OLD_EXPERIMENT = """
model: {model}
data: {data}
attributor:
  class_path: wherefrom.attributors.by_size.BySize
  init_args:
    method: {method}
queries:
  pictures:
    - file: {picture}
      prompt: a big red square
  resize: true
output: {output}
store: {store}
"""
OLD_METHOD = """
class_path: AttributionByUnlearning
init_args:
  unlearning: {steps: 1, draws: 4, measure_draws: 4, rise: 0.0001}
  grid: {timesteps: 2, flips: false}
  fisher: {visits: 1}
"""


def test_an_experiment_of_the_release_before_still_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "pictures", 12)
    (tmp_path / "method.yaml").write_text(OLD_METHOD)
    experiment = tmp_path / "old.yaml"
    picture = next(folder.glob("**/*.png"))
    experiment.write_text(
        OLD_EXPERIMENT.format(
            model=tiny_pipeline(tmp_path / "pipeline"),
            data=json.dumps({"class_path": "ImageFolder", "init_args": {"folder": str(folder)}}),
            method="method.yaml",
            picture=picture,
            output=tmp_path / "run",
            store=tmp_path / "store",
        )
    )
    words = ["attribute", "-c", str(experiment), "--attributor.init_args.method.init_args.fisher.visits", "2"]
    evaluate.main(words)
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("warning: old names")]
    for part in (
        "old.yaml: ",
        "method.yaml: ",
        "pictures → images",
        "draws → noise_samples",
        "visits → samples_per_image",
    ):
        assert part in line
    identity = json.loads((tmp_path / "run" / "manifest.json").read_text())["identity"]["attributor"]
    assert "'visits': 2" in str(identity)
    assert (tmp_path / "run" / "ranking.parquet").exists()


def test_settings_are_typed(tmp_path: Path) -> None:
    _, settings = parse(["attribute", "-c", str(attribution_config(tmp_path))])
    assert isinstance(settings, RunSettings)
    assert settings.output == tmp_path / "run"
    assert settings.deciding() == json.loads(json.dumps(settings.deciding()))
    assert "store" not in settings.deciding()["data"]["init_args"]
