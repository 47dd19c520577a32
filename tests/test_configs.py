"""Every file in configs/ is understood, and makes what it names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

import evaluate
import train
from tests.support.tiny import tiny_clip, tiny_ranker, tiny_vision_transformer
from wherefrom.attributors import Attributor
from wherefrom.commands.method_files import load_methods

ROOT = Path(__file__).parents[1]
ATTRIBUTORS = sorted((ROOT / "configs" / "attributor").rglob("*.yaml"))
EXPERIMENTS = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What attributor files name and is not here -> the same in its real format, tiny."""
    root = tmp_path_factory.mktemp("encoders")
    feature_map = root / "map.safetensors"
    save_file({"weight": np.zeros((2, 8), dtype=np.float32), "bias": np.zeros(2, dtype=np.float32)}, feature_map)
    return {
        "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K": tiny_clip(root / "clip"),
        "facebook/dino-vitb16": tiny_vision_transformer(root / "dino"),
        "facebook/dinov2-with-registers-large": tiny_vision_transformer(root / "dinov2", registers=2),
        "path/to/training_map.safetensors": feature_map,
        "path/to/synthesized_map.safetensors": feature_map,
        "runs/emoji_ranker/ranker": tiny_ranker(root / "ranker", {"efficientnet": 1280, "minilm": 384}),
    }


def here(path: Path, stand_ins: dict[str, Path], folder: Path) -> Path:
    """A copy of an attributor file that names the stand-ins."""
    text = path.read_text()
    for name, stand_in in stand_ins.items():
        text = text.replace(name, str(stand_in))
    (folder / path.name).write_text(text)
    return folder / path.name


@pytest.mark.parametrize("path", ATTRIBUTORS, ids=lambda path: path.stem)
def test_every_attributor_file_makes_its_attributor(path: Path, stand_ins: dict[str, Path], tmp_path: Path) -> None:
    copy = here(path, stand_ins, tmp_path)
    parser = evaluate.parser()
    arguments = ["--model", "m", "--data", "ImageFolder", "--data.init_args.folder", "f", "--output", "o"]
    config = parser.parse_args(["attribute", *arguments, "--attributor", str(copy)])
    made = parser.instantiate(config).attribute.attributor
    assert isinstance(made, Attributor)
    assert json.dumps(made.identity())
    assert type(made).__name__ == yaml.safe_load(path.read_text())["class_path"].rsplit(".", 1)[-1]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_file_is_understood(
    path: Path, stand_ins: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(path.read_text())
    first = path.read_text().splitlines()[0]
    assert path.name in first, "it opens with the command that runs it"
    _, _, program, command, *_ = first.split()
    if program == "evaluate.py":
        config = evaluate.parser().parse_args([command, "-c", str(path)])[command]
        assert config.output == content["output"]
        if "methods" in content:
            files = [Path(file.absolute) for file in config.methods]
            assert [file.stem for file in files] == [Path(file).stem for file in content["methods"]]
            copies = [here(file, stand_ins, tmp_path) for file in files]
            made = load_methods(copies, config.settings, config.variants, strict=True)
            assert list(made) == [*(file.stem for file in files), *content.get("variants", {})]
    else:
        with pytest.raises(SystemExit) as ended:
            train.main(["fit", "-c", str(path), "--print_config"])
        assert ended.value.code in (0, None)
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["model"]["class_path"]
        assert printed["trainer"]["max_steps"] == content["trainer"]["max_steps"]


def test_there_are_files_to_try() -> None:
    assert len(ATTRIBUTORS) >= 2
    assert len(EXPERIMENTS) >= 3
