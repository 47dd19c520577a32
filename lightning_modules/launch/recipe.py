"""A training experiment as a recipe: the identity of its weights, and retraining on a part of the images."""

from __future__ import annotations

import inspect
import io
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from lightning.pytorch.cli import ArgsType, LightningCLI

from lightning_modules.launch.opened_wandb import finish
from wherefrom.counterfactual.retraining import PIPELINE, RetrainingJob
from wherefrom.runtime.artifacts import hash_file
from wherefrom.runtime.stable_names import stable

# Where results go and how they are shown: everything else of the model's settings decides the weights.
_NOT_DECIDING = ("save_to", "text_source", "init_from")
_DECIDING_DATA = ("batch_size", "flip_share", "caption_dropout")
_DECIDING_TRAINER = ("max_steps", "gradient_clip_val", "gradient_clip_algorithm", "precision")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what Lightning says at the start of each fit (devices, seeds, tips) out of a sweep's own lines."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


class TrainMain(Protocol):
    """The `main` of train.py, which whoever makes a recipe hands over: this package does not import root scripts."""

    def __call__(self, args: ArgsType = None, run: bool = True) -> LightningCLI:
        """Runs a command line of Lightning's, or only makes what it names."""
        ...


class Recipe:
    """An experiment file of `train.py fit` for a latent diffusion model.

    Args:
        file: The file.
        store: Where the data module keeps images and latents.
        train_main: `train.main`; a function at the top of a script, so that other processes find it too.
        every_n_steps: Steps between the checkpoints that an interrupted training goes on from.

    Raises:
        ValueError: The file does not train a latent diffusion model for a fixed number of steps.
    """

    def __init__(self, file: str | Path, store: str | Path, train_main: TrainMain, every_n_steps: int = 500) -> None:
        self.file, self.store, self.every_n_steps = Path(file), Path(store), every_n_steps
        self.train_main = train_main
        printed = io.StringIO()
        with redirect_stdout(printed), suppress(SystemExit):
            train_main(["fit", "-c", str(self.file), "--print_config"])
        self.config: dict[str, Any] = yaml.safe_load(printed.getvalue())
        kind, steps = self.config["model"]["class_path"], self.config["trainer"]["max_steps"]
        if kind.rsplit(".", 1)[-1] != "LatentDiffusion" or steps < 1:
            raise ValueError(
                f"{self.file} trains {kind} for {steps} steps: a recipe trains LatentDiffusion for a fixed number of "
                "steps (trainer.max_steps)."
            )

    def identity(self) -> dict[str, Any]:
        """Settings that decide the weights, but for seed and images."""
        model = dict(self.config["model"]["init_args"])
        start = model.get("init_from")
        return {
            "model": stable({name: value for name, value in model.items() if name not in _NOT_DECIDING}),
            "init_from": None if start is None else hash_file(Path(start) / "diffusion_pytorch_model.safetensors"),
            "data": {name: self.config["data"]["init_args"][name] for name in _DECIDING_DATA},
            "trainer": {name: self.config["trainer"][name] for name in _DECIDING_TRAINER},
        }

    def train(self, job: RetrainingJob, folder: Path) -> None:
        """Trains in the folder, going on from its last checkpoint, and leaves a pipeline there; see `RetrainedModels`.

        The file's callbacks stay, but for its checkpoints; so do its loggers, beside a CSV file in the folder.

        Raises:
            ValueError: Training ended with an error.
        """
        checkpoints, excluded = folder / "checkpoints", folder / "excluded.txt"
        excluded.write_text("".join(f"{name}\n" for name in job.exclude))
        options: Sequence[tuple[str, str]] = (
            ("--data.init_args.store", str(self.store)),
            ("--data.init_args.exclude", str(excluded)),
            ("--data.init_args.seed", str(job.seed)),
            ("--seed_everything", str(job.seed)),
            ("--model.init_args.save_to", str(folder / PIPELINE)),
            ("--trainer.default_root_dir", str(folder)),
            ("--trainer.logger", json.dumps(self._replace("logger", "CSVLogger", {"save_dir": str(folder)}))),
            (
                "--trainer.callbacks",
                json.dumps(
                    self._replace(
                        "callbacks",
                        "ModelCheckpoint",
                        {"dirpath": str(checkpoints), "every_n_train_steps": self.every_n_steps, "save_last": True},
                    )
                ),
            ),
        )
        last = checkpoints / "last.ckpt"
        resume = ["--ckpt_path", str(last)] if last.exists() else []
        arguments = ["fit", "-c", str(self.file), *(word for pair in options for word in pair), *resume]
        if self._many_devices():
            # Lightning starts its other processes by this one's own command line, so it gets one of its own.
            script = inspect.getsourcefile(inspect.unwrap(self.train_main))
            done = subprocess.run([sys.executable, str(script), *arguments], check=False)
            if done.returncode:
                raise ValueError(f"Training in {folder} ended with exit status {done.returncode}; see above.")
        else:
            with _quiet():
                finish(self.train_main(arguments).trainer)
        shutil.rmtree(checkpoints, ignore_errors=True)

    def _many_devices(self) -> bool:
        trainer = self.config["trainer"]
        accelerator, devices, nodes = (trainer[name] for name in ("accelerator", "devices", "num_nodes"))
        if devices in ("auto", -1, "-1"):
            return nodes > 1 or (accelerator in ("auto", "gpu", "cuda") and torch.cuda.device_count() > 1)
        return nodes > 1 or (len(devices) if isinstance(devices, list) else int(devices)) > 1

    def _replace(self, kind: str, name: str, init_args: dict[str, Any]) -> list[dict[str, Any]]:
        """What the file's trainer is given of a kind, with one of a class in place of the file's of that class."""
        given = self.config["trainer"][kind]
        listed = [each for each in (given if isinstance(given, list) else [given]) if isinstance(each, dict)]
        package = {"logger": "lightning.pytorch.loggers", "callbacks": "lightning.pytorch.callbacks"}[kind]
        kept = [each for each in listed if each["class_path"].rsplit(".", 1)[-1] != name]
        # First, since Lightning keeps the configuration beside what the first logger writes.
        return [{"class_path": f"{package}.{name}", "init_args": init_args}, *kept]
