"""Every experiment file takes a real step: with tiny stand-ins for weights and data that are not here, nothing mocked.

The files are copied with small numbers in place of large ones; what they need of each other they make in turn, as a
user would: a ranker is trained on the teacher set that the file before it curated.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import save_file

import evaluate
import train
from tests.support.pipelines import stable_diffusion
from tests.support.tiny import tiny_clip, tiny_folder, tiny_pipeline, tiny_ranker, tiny_vision_transformer
from tests.support.worlds import make_coco, make_shards
from wherefrom.runtime.artifacts import MANIFEST

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))
# Numbers that decide how long something takes, by their names.
SMALL: dict[str, Any] = {
    "max_steps": 1,
    "noise_samples": 4,
    "measurement_samples": 4,
    "timesteps": 2,
    "samples_per_image": 1,
    "sampling_steps": 2,
    "val_check_interval": 1,
    "every_n_train_steps": 1,
    "random_removal_curve": [2, 4],
    "query_groups": [2],
    "random": 1,
    "k": 5,
    "random_subsets": {"count": 3, "repeated": 1, "further_seeds": [1]},
    "block_out_channels": [8, 16],
    "width": 16,
    "dimension": 100,
    "validation_share": 0.5,
    "log_every_n_steps": 1,
    "relative_loss_increase": 1e-4,
    "outputs": 8,
    "limit": 1,
}
AT_MOST = {"steps": 1, "count": 4, "batch_size": 8, "skip": 4, "iterative_removal_rounds": 2}
FIRST = {"prompts": 2, "also": 1, "seeds": 1, "words": 1}
# What each experiment needs of others, whose runs it finds below `runs`.
NEEDS = {
    "emoji_ranker": ["emoji_1k_teacher"],
    "emoji_customized_benchmark": ["emoji_customized"],
    "mscoco_teacher": ["mscoco_diffusion"],
    "mscoco_ranker": ["mscoco_diffusion", "mscoco_teacher"],
    "stable_diffusion_benchmark": ["stable_diffusion_customized"],
}
MSCOCO_UNET = {"block_out_channels": [8, 8, 8, 16], "norm_num_groups": 4, "cross_attention_dim": 12, "sample_size": 4}


def small(name: str, value: Any) -> Any:
    """A setting with small numbers in place of large ones."""
    last = name.rsplit(".", 1)[-1]
    if isinstance(value, dict) and last not in SMALL:
        if value.get("class_path") == "Emoji":
            options = value["init_args"].setdefault("options", {})
            start = options.get("concepts", [0.0, 1.0])[0]
            value = {
                **value,
                "init_args": {**value["init_args"], "options": {**options, "concepts": [start, start + 0.015]}},
            }
        if value.get("class_path") == "LAION":
            value["init_args"]["validation_share"] = 0.5  # of a few images
        if value.get("cross_attention_dim") == 1024:
            return {**value, **MSCOCO_UNET}
        return {key: small(key, each) for key, each in value.items() if key != "workers" and key != "compile"}
    if name == "concepts":
        return value
    if last in ("k", "ks") and isinstance(value, list):
        return [2] if last == "ks" else [1, 2, 3]
    if last == "block_out_channels":
        return value
    if last in SMALL and value is not None:
        return SMALL[last]
    if name in AT_MOST:
        return min(value, AT_MOST[name])
    if last in FIRST:
        return value[: FIRST[last]]
    if last == "size" and value in (128, 512):
        return 8
    if isinstance(value, list):
        return [small("", each) for each in value]
    return value


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with small copies of the configurations and stand-ins for everything that they name."""
    root = tmp_path_factory.mktemp("world")
    for committed in ("weights", "results"):
        (root / committed).symlink_to(ROOT / committed)
    make_coco(root / "data" / "mscoco", train=12, validation=4)
    make_shards(root / "data" / "laion", shards=2, count=24)
    for name, width in (("clip", 6), ("dino", 8)):
        learned = {"weight": np.eye(2, width, dtype=np.float32), "bias": np.zeros(2, dtype=np.float32)}
        save_file(learned, root / f"{name}_map.safetensors")
    stand_ins = {
        "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K": tiny_clip(root / "clip"),
        "facebook/dino-vitb16": tiny_vision_transformer(root / "dino"),
        "facebook/dinov2-with-registers-large": tiny_vision_transformer(root / "dinov2", registers=2),
        "runs/emoji_ranker/ranker": tiny_ranker(root / "ranker", {"efficientnet": 1280, "minilm": 384}),
        "CompVis/stable-diffusion-v1-4": stable_diffusion(root / "sd1", 1),
        "stabilityai/stable-diffusion-2-base": stable_diffusion(root / "sd2", 2),
        "path/to/pipeline": tiny_pipeline(root / "pipeline"),
        "path/to/images": tiny_folder(root / "pictures"),
        "FOLDER": exemplars(root / "exemplars", "<new1> style", 32),
        "EXEMPLARS": exemplars(root / "sd exemplars", "photo of a <new1> cat", 8),
        "SHARDS": root / "data" / "laion",
        "ktn": "k",
    }
    for file in (file for folder in (ROOT / "configs").iterdir() for file in folder.rglob("*.yaml")):  # links also
        text = file.read_text()
        for name, stand_in in stand_ins.items():
            text = text.replace(name, str(stand_in))
        for side in ("training", "synthesized"):
            learned_map = root / f"{file.stem.split('_')[0]}_map.safetensors"
            text = text.replace(f"path/to/{side}_map.safetensors", str(learned_map))
        content = small("", yaml.safe_load(text))
        if "recipe" in content:
            content.pop("model", None)  # it was trained in more steps than one
            few = ("caption.yaml", "abu.yaml")  # `emoji_comparison` runs all
            methods = content["methods"]
            chosen = [method for method in methods if method.endswith(few)]
            content["methods"] = chosen if len(chosen) == len(few) else methods[:2]
            stems = {Path(method).stem for method in content["methods"]}
            if "settings" in content:
                settings = content["settings"].items()
                content["settings"] = {k: v for k, v in settings if "/" not in k or k.split("/")[0] in stems}
            if "variants" in content:
                own = [name for name, each in content["variants"].items() if min(each).split("/")[0] in stems]
                content["variants"] = {own[0]: content["variants"][own[0]]}
        copy = root / "configs" / file.relative_to(ROOT / "configs")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(content))  # JSON is YAML
    before = Path.cwd()
    os.chdir(root)
    yield root
    os.chdir(before)


def exemplars(folder: Path, caption: str, size: int) -> Path:
    """A few images that a model is customized on."""
    folder.mkdir()
    rows = []
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def write_tasks(root: Path, model: Path, cases: list[str], size: int) -> None:
    """A list of one customized model for each test case, with its exemplars and an image, below a root."""
    tasks = []
    (root / "json").mkdir(parents=True, exist_ok=True)
    for case in cases:
        for folder, count in (("exemplar", 2), ("synth", 1)):
            (root / "dataset" / folder / case).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = np.random.default_rng(index).integers(0, 255, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "dataset" / folder / case / f"{index}.png")
        shutil.copytree(model, root / "models" / case, dirs_exist_ok=True)
        paths = {name: f"dataset/{name}/{case}" for name in ("exemplar", "synth")}
        exemplar = [f"{paths['exemplar']}/{index}.png" for index in range(2)]
        (root / "json" / f"{case}.json").write_text(
            json.dumps([{"exemplar": exemplar, "synth": {"own": [f"{paths['synth']}/0.png"]}}])
        )
        tasks.append(
            {
                "synth_image_path": f"{paths['synth']}/0.png",
                "prompt": "a <new1> cat",
                "test_case": case,
                "test_case_ind": 0,
                "model_path": f"models/{case}",
                "train_prompt": "<new1> cat",
                "category": "cat",
            }
        )
    (root / "tasks.json").write_text(json.dumps(tasks))


@pytest.fixture(scope="module")
def ran(world: Path) -> Callable[[str], dict[str, Any]]:
    """Runs an experiment's own command once, after those that it needs; gives its settings."""
    done: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name in done:
            return done[name]
        for needed in NEEDS.get(name, []):
            run(needed)
        if name == "emoji_customized_benchmark":
            write_tasks(world / "runs/customized", world / "runs/emoji_customized/model", ["emoji_styles", "other"], 32)
        if name == "stable_diffusion_benchmark":
            made = world / "runs/stable_diffusion_customized/model"
            write_tasks(world / "data/abc", made, ["test_artchive", "test_bamfg", "test_unobserved_imagenet"], 8)
        command = (ROOT / "configs" / "experiment" / f"{name}.yaml").read_text().splitlines()[0].split()
        content: dict[str, Any] = json.loads((world / "configs" / "experiment" / f"{name}.yaml").read_text())
        words = [command[3], "-c", f"configs/experiment/{name}.yaml"]
        if name == "image_folder":
            words += ["--queries.prompts", '["a big red square"]']  # its command names an image of the user's own
        if command[2] == "train.py":
            words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
            if name == "mscoco_ranker":
                words += ["--model.init_args.ranker.init_args.inputs", str(mscoco_width(world))]
            train.main(words)
        else:
            evaluate.main(words)
        done[name] = content
        return content

    return run


def mscoco_width(world: Path) -> int:
    """Width of both encoders' features in the teacher set."""
    folder = world / "runs" / "mscoco_teacher"
    return sum(np.load(path, mmap_mode="r").shape[1] for path in folder.rglob("*training*.npy"))


# Unlearning draws its steps from the model and validates nothing.
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
@pytest.mark.filterwarnings("ignore:The ranker's")  # scale and predictions are what they are after one step
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_takes_a_real_step(name: str, world: Path, ran: Callable[[str], dict[str, Any]]) -> None:
    content = ran(name)
    if "trainer" in content and "max_steps" in content["trainer"]:
        folder = world / content["trainer"]["default_root_dir"]
        logged = list(folder.rglob("metrics.csv"))
        assert logged, "it logged what it measured"
        assert any("/" in path.read_text().splitlines()[0] for path in logged)
        saved = [path for path in folder.rglob("*") if path.suffix in (".ckpt", ".safetensors")]
        assert saved or name.startswith("unlearn"), "it left weights or a checkpoint"
        for path in saved:
            if path.suffix == ".ckpt":
                assert torch.load(path, map_location="cpu", weights_only=True)["global_step"] == 1
    else:
        folder = world / content["output"]
        results = [path for path in folder.rglob("*") if path.name in (MANIFEST, "counterfactual.json", "lds.json")]
        assert results or (folder / "customized.json").exists()
