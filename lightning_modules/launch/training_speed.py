"""Speed of a training: what comes before it, and seconds of a step, measured on a few."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from datamodules.images import ImageDataModule
from lightning_modules.autoencoder import Autoencoder
from lightning_modules.latent_diffusion import LatentDiffusion
from lightning_modules.launch.recipe import TrainMain
from wherefrom.commands.budget import Sizes, encoding
from wherefrom.commands.estimate import Stage, timed
from wherefrom.training.keyed_batches import LatentBatch, PixelBatch

_STEPS = 3  # training steps that are timed, after one that sets things up


def sizes_of(data: ImageDataModule) -> tuple[Sizes, float]:
    """Sizes of the data, and seconds to read an image of them (0 where they are read already)."""
    census = data.census()
    sizes = Sizes(census.training, census.held_out, census.size, census.captions, data.half)
    return sizes, 0.0 if census.decode is None else timed(census.decode)


def training_speed(words: Sequence[str], train_main: TrainMain) -> tuple[list[Stage], float, Any]:
    """Stages before a training, seconds of a step, and the command line.

    Args:
        words: Words after `train.py fit`.
        train_main: `train.main`.
    """
    cli = train_main(list(words), run=False)
    module, data = cli.model, cli.datamodule
    if hasattr(module, "save_to"):
        module.save_to = None  # nothing is kept of what is tried here
    if not isinstance(data, ImageDataModule) or not isinstance(module, Autoencoder | LatentDiffusion):
        return [], _real_steps(module, data, cli.trainer.max_steps), cli
    stages: list[Stage] = []
    data.trains = True
    sizes, decode_s = sizes_of(data)
    if isinstance(module, Autoencoder):
        count = sizes.training + sizes.held_out
        stages.append(Stage(f"read {count:,} images", count * decode_s))
        batch: Any = PixelBatch(torch.arange(data.batch_size), torch.zeros(data.batch_size, 3, *sizes.size))
    else:
        stages, blank = encoding(module.model_of(data.encoder), sizes, decode_s)
        assert blank.latents is not None
        rows = torch.arange(data.batch_size) % sizes.training
        latents, conditioning = blank.latents.latents_at(rows, 0), blank.latents.conditioning_at(rows, 0)
        batch = LatentBatch(torch.arange(data.batch_size), torch.rand(data.batch_size), latents, conditioning)
    first, step_s = _steps(module, batch)
    return [*stages, Stage("the first step, which may compile", first)], step_s, cli


def _steps(module: LightningModule, batch: Any) -> tuple[float, float]:
    """Seconds of the first training step, and of a later one, on one batch."""
    made: Any = module.configure_optimizers()
    result: Optimizer = made["optimizer"] if isinstance(made, dict) else made
    module.train()

    def step() -> int:
        loss: Any = module.training_step(batch)
        loss.backward()
        result.step()
        result.zero_grad()
        return 1

    return timed(step), timed(lambda: sum(step() for _ in range(_STEPS)))


class _Clock(Callback):
    """Notes when each batch of a training ended, and ends it after a few."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Notes the time."""
        self.ends.append(time.perf_counter())
        trainer.should_stop = len(self.ends) > _STEPS


def _real_steps(module: LightningModule, data: LightningDataModule, steps: int) -> float:
    """Seconds of a step of a training on its real data."""
    clock = _Clock()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    return (clock.ends[-1] - clock.ends[0]) / max(len(clock.ends) - 1, 1)
