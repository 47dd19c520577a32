"""Budgets of commands: the stages of each, at rates measured on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from datamodules.images import ImageDataModule
from lightning_modules.launch.commands import attribute, compare, counterfactual, curate, customized, lds
from lightning_modules.launch.models import named_model
from lightning_modules.launch.recipe import TrainMain
from lightning_modules.launch.settings import ModelSettings, TrialSettings
from lightning_modules.launch.training_speed import sizes_of, training_speed
from wherefrom.attributors import Attributor, TrainingData
from wherefrom.commands.budget import drawing, encoding, features, method
from wherefrom.commands.estimate import Stage, forward_rate
from wherefrom.counterfactual.protocol import Protocol
from wherefrom.models.diffusion import DiffusionModel


def of_attribute(settings: attribute.Settings) -> list[Stage]:
    """The stages of `attribute`."""
    stages, data, rate, queries = _with_queries(settings)
    attributor = settings.attributor
    return stages + method(type(attributor).__name__, attributor=attributor, data=data, queries=queries, rate=rate)


def of_compare(settings: compare.Settings) -> list[Stage]:
    """The stages of `compare`."""
    stages, data, rate, queries = _with_queries(settings)
    return stages + _methods(settings.methods, data, queries, rate)


def of_customized(settings: customized.Settings) -> list[Stage]:
    """The stages of `customized`."""
    stages, data, rate = _encoded(settings)
    tasks = settings.read_tasks()
    queries = sum(len(task.queries) for task in tasks) * len(settings.words)
    for stage in _methods(settings.methods, data, queries, rate):
        # What is made once for a model is made again for each customized one, but for curvature and features.
        per_model = "once for this model" in stage.name
        stages.append(
            Stage(stage.name, stage.seconds, stage.disk, stage.memory, "a model", len(tasks)) if per_model else stage
        )
    return stages


def of_curate(settings: curate.Settings) -> list[Stage]:
    """The stages of `curate`."""
    stages, data, rate = _encoded(settings)
    queries, source = settings.captions.count, settings.queries
    stages.append(drawing(queries, source.sampling_steps, source.guidance, rate))
    if settings.nearest is not None:
        stages += method("candidates", attributor=settings.nearest, data=data, queries=queries, rate=rate)
    teaching = method(
        "teacher",
        attributor=settings.teacher,
        data=data,
        queries=queries,
        rate=rate,
        candidates=settings.subsample or settings.k,
    )
    stages += [replace(stage, at_once=settings.workers.count) if stage.each else stage for stage in teaching]
    return stages + [features(encoder, data, name) for name, encoder in settings.features.items()]


def of_counterfactual(settings: counterfactual.Settings, train_main: TrainMain) -> list[Stage]:
    """The stages of `counterfactual`."""
    protocol = settings.protocol
    count = removals(protocol, len(settings.methods), len(settings.queries.prompts))
    return _of_trial(settings, train_main, count, protocol.timesteps)


def of_lds(settings: lds.Settings, train_main: TrainMain) -> list[Stage]:
    """The stages of `lds`."""
    subsets = settings.random_subsets
    count = 1 + subsets.count + subsets.repeated * len(subsets.further_seeds)
    return _of_trial(settings, train_main, count, settings.timesteps)


def of_fit(words: Sequence[str], train_main: TrainMain) -> list[Stage]:
    """The stages of `train.py fit`.

    Raises:
        ValueError: The training has no fixed number of steps.
    """
    stages, step_s, cli = training_speed(words, train_main)
    steps = cli.trainer.max_steps
    if steps < 1:
        raise ValueError("A training of unknown length has no budget: set trainer.max_steps.")
    return [*stages, Stage("training steps", step_s, each="a step", times=steps)]


def removals(protocol: Protocol, methods: int, queries: int) -> int:
    """Models that a protocol trains, at most."""
    groups = [-(-queries // size) for _, size in protocol.stages()]
    each = 1 + 2 * protocol.additivity_groups + max(protocol.iterative_removal_rounds - 1, 0)
    per_seed = 1 + sum(groups) * (methods * each + protocol.random)
    return per_seed * len(protocol.seeds) + len(protocol.random_removal_curve) * protocol.random_removal_samples


def _of_trial(settings: TrialSettings, train_main: TrainMain, count: int, timesteps: int) -> list[Stage]:
    """At most so many trainings, since what is known is not trained again."""
    settings.data.trains = True  # what the recipe holds out is not ranked either
    stages, step_s, cli = training_speed(["-c", str(settings.recipe)], train_main)
    model = cli.model.model_of(settings.data.encoder)
    encoded, data, rate = _stages_of_data(settings.data, model)
    prompts, also, source = settings.queries.prompts, settings.also, settings.queries
    draw = drawing(len(prompts) + len(also), source.sampling_steps, source.guidance, rate)
    panel = (len(prompts) + len(also)) * timesteps
    weights = sum(parameter.numel() for parameter in model.denoiser.parameters())
    train_again = Stage(
        "trainings, at most",
        step_s * cli.trainer.max_steps + panel / rate,
        disk=4 * weights * count,
        each="a model and its measurements",
        times=count,
        at_once=settings.workers.count,
    )
    compiled = [stage for stage in stages if stage.name.startswith("the first step")]
    return [*encoded, draw, *_methods(settings.methods, data, len(prompts), rate), *compiled, train_again]


def _with_queries(settings: ModelSettings) -> tuple[list[Stage], TrainingData, float, int]:
    """Stages up to the drawn queries, data of the right shapes, forward passes a second, and the queries' number."""
    stages, data, rate = _encoded(settings)
    source = settings.queries
    stages.append(drawing(len(source.prompts), source.sampling_steps, source.guidance, rate))
    return stages, data, rate, len(source.prompts) + len(source.images) + len(source.regions)


def _encoded(settings: ModelSettings) -> tuple[list[Stage], TrainingData, float]:
    model = settings.trainer.accelerate(named_model(settings.model, settings.lora))
    settings.data.take_size(model)
    return _stages_of_data(settings.data, model)


def _stages_of_data(data: ImageDataModule, model: DiffusionModel) -> tuple[list[Stage], TrainingData, float]:
    sizes, decode_s = sizes_of(data)
    stages, blank = encoding(model, sizes, decode_s)
    assert blank.latents is not None
    return stages, blank, forward_rate(model, blank.latents)


def _methods(methods: Mapping[str, Attributor], data: TrainingData, queries: int, rate: float) -> list[Stage]:
    return [
        stage
        for name, each in methods.items()
        for stage in method(name, attributor=each, data=data, queries=queries, rate=rate)
    ]
