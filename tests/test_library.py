"""The library is usable without Lightning and without the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import tiny_folder, tiny_pipeline
from wherefrom.rankings.ranking_file import read_ranking

ROOT = Path(__file__).parents[1]

WITHOUT_LIGHTNING = """
import sys

names = "lightning lightning.pytorch lightning.fabric pytorch_lightning lightning_fabric jsonargparse"
for name in names.split():
    sys.modules[name] = None  # importing it now fails
"""

EVERYTHING = """
import importlib, pkgutil
import wherefrom

names = [module.name for module in pkgutil.walk_packages(wherefrom.__path__, "wherefrom.")]
for name in names:
    importlib.import_module(name)
"""

TEN_LINES = """
import sys
import torch
from diffusers import DiffusionPipeline
from pathlib import Path
from transformers import AutoModel

from wherefrom.commands.attribute import attribute
from wherefrom.attributors import AttributionByUnlearning, TrainingData
from wherefrom.curvature import DiagonalFisher, FisherSettings
from wherefrom.data.image_folder import build_image_folder, split_images
from wherefrom.data.encoded_images import encode_image_set
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.models.pipeline import model_from_pipeline
from wherefrom.queries.sources import generate
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.artifacts import Store
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings

model_folder, text_folder, pictures_folder, out = sys.argv[1:]
text = AutoModel.from_pretrained(text_folder)
model = model_from_pipeline(DiffusionPipeline.from_pretrained(model_folder, text_encoder=text))
store, runner = Store(out + "/store"), Runner.current(torch.device("cpu"))
train, held_out = split_images(build_image_folder(store, Path(pictures_folder)), 0.1)
latents = [encode_image_set(images, encoder=model.encoder, store=store) for images in (train, held_out)]
data = TrainingData(train, latents[0], held_out, latents[1])
settings = UnlearningSettings(noise_samples=16, measurement_samples=16, relative_loss_increase=0.01)
curvature = DiagonalFisher(FisherSettings(samples_per_image=1))
method = AttributionByUnlearning("all", unlearning=settings, grid=LossGrid(timesteps=2), curvature=curvature)
queries = generate(model, prompts=["a big red square"], seed=0, shape=(4, 4, 4), sampling_steps=2)
(scores,) = attribute(
    Path(out + "/run"), attributor=method, data=data, model=model, queries=queries, store=store, runner=runner
)
print(len(names), scores.ids[scores.scores.argmax()])
"""


def run(script: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIGHTNING + script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().splitlines()[-1]


def test_every_module_is_imported_and_an_image_attributed_without_lightning(tmp_path: Path) -> None:
    model = tiny_pipeline(tmp_path / "model")
    folders = model, tmp_path / "model-text", tiny_folder(tmp_path / "pictures"), tmp_path / "out"
    count, first = run(EVERYTHING + TEN_LINES, *folders).split()
    package = ROOT / "wherefrom"
    assert int(count) == len([path for path in package.rglob("*.py") if path != package / "__init__.py"])
    ((ids, _),) = read_ranking(tmp_path / "out" / "run").values()
    assert ids[0] == first
    assert len(ids) == 16
    assert (tmp_path / "out" / "run" / "report.html").exists()


def test_lightning_is_really_out_of_reach() -> None:
    with pytest.raises(AssertionError, match="import of lightning halted"):
        run("import lightning")
