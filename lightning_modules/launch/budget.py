"""Budgets of command lines: `evaluate.py budget COMMAND …` takes the words of the command that it precedes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

import train
from datamodules.images import ImageDataModule
from lightning_modules.autoencoder import Autoencoder
from lightning_modules.latent_diffusion import LatentDiffusion
from wherefrom.attributors import TrainingData
from wherefrom.commands.budget import Sizes, drawing, encoding, features, method
from wherefrom.commands.estimate import Stage, forward_rate, timed
from wherefrom.commands.method_files import methods_of
from wherefrom.data.stream import LatentBatch, PixelBatch
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_model

_STEPS = 3  # training steps that are timed, after one that sets things up


def sizes_of(data: ImageDataModule) -> tuple[Sizes, float]:
    """How large the data are, and seconds to read an image of them (0 where they are read already)."""
    census = data.census()
    sizes = Sizes(census.training, census.held_out, census.size, census.captions, data.half)
    return sizes, 0.0 if census.decode is None else timed(census.decode)


def of_queries(command: str, config: Any) -> list[Stage]:
    """The stages of `attribute`, `compare`, `curate` and `customized`."""
    model = config.trainer.accelerate(load_model(config.model))
    stages, data, rate = _begun(config.data, model)
    if command == "customized":
        from wherefrom.commands import customization_tasks

        tasks = customization_tasks.read_all([Path(file) for file in config.tasks], Path(config.root), config.limit)
        queries = sum(len(task.queries) for task in tasks) * len(config.words)
        for stage in _methods(config, data, queries, rate):
            # What is made once for a model is made again for each customized one, but for curvature and features.
            per_model = "once for this model" in stage.name
            stages.append(
                Stage(stage.name, stage.seconds, stage.disk, stage.memory, "a model", len(tasks))
                if per_model
                else stage
            )
        return stages
    if command == "curate":
        queries = config.captions.count
        stages.append(drawing(queries, config.queries.sampling_steps, config.queries.guidance, rate))
        if config.nearest is not None:
            stages += method("candidates", attributor=config.nearest, data=data, queries=queries, rate=rate)
        teaching = method(
            "teacher",
            attributor=config.teacher,
            data=data,
            queries=queries,
            rate=rate,
            candidates=config.subsample or config.k,
        )
        stages += [replace(stage, at_once=config.workers.count) if stage.each else stage for stage in teaching]
        return stages + [features(encoder, data, name) for name, encoder in config.features.items()]
    queries = len(config.queries.prompts) + len(config.queries.images) + len(config.queries.regions)
    stages.append(drawing(len(config.queries.prompts), config.queries.sampling_steps, config.queries.guidance, rate))
    if command == "attribute":
        return stages + method(
            type(config.attributor).__name__, attributor=config.attributor, data=data, queries=queries, rate=rate
        )
    return stages + _methods(config, data, queries, rate)


def of_trials(command: str, config: Any) -> list[Stage]:
    """The stages of `counterfactual` and `lds`: at most so many trainings, since what is known is not trained again."""
    stages, step_s, cli = _training(["-c", str(config.recipe.absolute)])
    model, data_module = cli.model.model_of(config.data.encoder), config.data
    begun, data, rate = _begun(data_module, model)
    prompts, also = config.queries.prompts, config.also
    panel = (len(prompts) + len(also)) * (config.protocol if command == "counterfactual" else config).timesteps
    if command == "lds":
        subsets = config.random_subsets
        count = 1 + subsets.count + subsets.repeated * len(subsets.further_seeds)
    else:
        count = _removals(config.protocol, len(config.methods), len(prompts))
    draw = drawing(len(prompts) + len(also), config.queries.sampling_steps, config.queries.guidance, rate)
    weights = sum(parameter.numel() for parameter in model.denoiser.parameters())
    train_again = Stage(
        "trainings, at most",
        step_s * cli.trainer.max_steps + panel / rate,
        disk=4 * weights * count,
        each="a model and its measurements",
        times=count,
        at_once=config.workers.count,
    )
    compiled = [stage for stage in stages if stage.name.startswith("the first step")]
    return [*begun, draw, *_methods(config, data, len(prompts), rate), *compiled, train_again]


def of_fit(words: Sequence[str]) -> list[Stage]:
    """The stages of `train.py fit`."""
    stages, step_s, cli = _training(words)
    steps = cli.trainer.max_steps
    if steps < 1:
        raise ValueError("A training of unknown length has no budget: set trainer.max_steps.")
    return [*stages, Stage("training steps", step_s, each="a step", times=steps)]


def _removals(protocol: Any, methods: int, queries: int) -> int:
    """Models that a protocol trains, at most."""
    groups = [-(-queries // size) for _, size in protocol.stages()]
    each = 1 + 2 * protocol.additivity_groups + max(protocol.iterative_removal_rounds - 1, 0)
    per_seed = 1 + sum(groups) * (methods * each + protocol.random)
    return per_seed * len(protocol.seeds) + len(protocol.random_removal_curve) * protocol.random_removal_samples


def _begun(data: ImageDataModule, model: DiffusionModel) -> tuple[list[Stage], TrainingData, float]:
    sizes, decode_s = sizes_of(data)
    stages, blank = encoding(model, sizes, decode_s)
    assert blank.latents is not None
    return stages, blank, forward_rate(model, blank.latents)


def _methods(config: Any, data: TrainingData, queries: int, rate: float) -> list[Stage]:
    methods = methods_of(config)
    return [
        stage
        for name, each in methods.items()
        for stage in method(name, attributor=each, data=data, queries=queries, rate=rate)
    ]


def _training(words: Sequence[str]) -> tuple[list[Stage], float, Any]:
    """What comes before a training, seconds of a step, and the command line."""
    cli = train.main(list(words), run=False)
    module, data = cli.model, cli.datamodule
    if hasattr(module, "save_to"):
        module.save_to = None  # nothing is kept of what is tried here
    if not isinstance(data, ImageDataModule) or not isinstance(module, Autoencoder | LatentDiffusion):
        return [], _real_steps(module, data, cli.trainer.max_steps), cli
    stages: list[Stage] = []
    sizes, decode_s = sizes_of(data)
    if isinstance(module, Autoencoder):
        count = sizes.training + sizes.held_out
        stages.append(Stage(f"read {count:,} images", count * decode_s))
        batch: Any = PixelBatch(torch.arange(data.batch_size), torch.zeros(data.batch_size, 3, *sizes.size))
    else:
        stages, blank = encoding(module.model_of(data.encoder), sizes, decode_s)
        assert blank.latents is not None
        rows = torch.arange(data.batch_size) % sizes.training
        latents, told = blank.latents.latents_at(rows, 0), blank.latents.conditioning_at(rows, 0)
        batch = LatentBatch(torch.arange(data.batch_size), torch.rand(data.batch_size), latents, told)
    first, step_s = _steps(module, batch)
    return [*stages, Stage("the first step, which may compile", first)], step_s, cli


def _steps(module: LightningModule, batch: Any) -> tuple[float, float]:
    """Seconds of the first training step, and of a later one, on one batch."""
    made: Any = module.configure_optimizers()
    result: Optimizer = made["optimizer"] if isinstance(made, dict) else made
    module.train()

    def step() -> int:
        module.training_step(batch).backward()
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
