"""What runs of evaluate.py work with: devices, methods, model, data, queries, and models trained again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning.fabric import Fabric

from datamodules.images import ImageDataModule
from lightning_modules.launch.recipe import Recipe
from wherefrom.attributors import Attributor, Query, Scores, TrainingData
from wherefrom.commands.compare import attribute_at_cost
from wherefrom.commands.method_files import methods_of
from wherefrom.counterfactual.generated_images import images_folder
from wherefrom.counterfactual.measurements import MeasurementTable
from wherefrom.counterfactual.query_panel import Panel
from wherefrom.counterfactual.reattribution import Reattribution, reattribution_folder
from wherefrom.counterfactual.retraining import RetrainedModels, RetrainingJob
from wherefrom.counterfactual.sweep import Sweep
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import QuerySource, make_queries
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Console
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.measured_cost import Cost


@dataclass(frozen=True)
class Devices:
    """Where to run; the same names as the trainer's.

    Attributes:
        accelerator: `auto`, `cpu`, `cuda`, …
        devices: How many on each machine.
        num_nodes: How many machines.
        strategy: `auto` or `ddp`.
        precision: `32`, or `bf16` for gradients in bfloat16; losses stay in float32 (see `DiffusionModel`).
        compile: Compile the network for passes without gradients.
        gradient_checkpointing: Compute activations again in backward passes, which takes less memory and more time.
    """

    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: Literal["32", "bf16"] = "32"
    compile: bool = False
    gradient_checkpointing: bool = False

    def accelerate(self, model: DiffusionModel) -> DiffusionModel:
        """Sets the model's options."""
        return model.accelerate(self.precision == "bf16", self.compile, self.gradient_checkpointing)


def training_data(data: ImageDataModule, model: DiffusionModel) -> TrainingData:
    """The training images and the held-out ones, with their latents by the model's own encoder."""
    data.encoder = model.encoder
    data.prepare_data()
    data.setup()
    return training_data_of(data)


def training_data_of(data: ImageDataModule) -> TrainingData:
    """The training images and the held-out ones of a module that is set up."""
    held_out = data.validation_images if len(data.validation_images) else None
    return TrainingData(
        data.train_images, data.train_latents, held_out, data.validation_latents if held_out is not None else None
    )


@dataclass(frozen=True)
class Run:
    """What a run over queries works with."""

    model: DiffusionModel
    data: TrainingData
    queries: list[Query]
    store: Store
    runner: Runner
    console: Console


def prepare(config: Any, methods: Iterable[Attributor], with_queries: bool = True) -> Run:
    """Launches the processes and makes model, data and the queries, with what the methods need of them."""
    devices: Devices = config.trainer
    fabric = Fabric(
        accelerator=devices.accelerator, strategy=devices.strategy, devices=devices.devices, num_nodes=devices.num_nodes
    )
    fabric.launch()
    runner = Runner.current(fabric.device)
    console = Console(runner.is_main)
    model = devices.accelerate(load_model(config.model).to(fabric.device))
    data_module: ImageDataModule = config.data
    data_module.store = store = Store(config.store)
    console.log("images, latents and captions")
    if runner.is_main:
        training_data(data_module, model)
    runner.barrier()
    data = training_data(data_module, model)
    if not with_queries:
        return Run(model, data, [], store, runner, console)
    console.log("queries")
    latent_shape, size = shapes(data)
    keep_trajectory = any("trajectory" in method.requires for method in methods)
    queries = make_queries(
        model,
        source=config.queries,
        latent_shape=latent_shape,
        size=size,
        progress=console.progress,
        keep_trajectory=keep_trajectory,
    )
    return Run(model, data, queries, store, runner, console)


def shapes(data: TrainingData) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """(C, H, W) of a latent, and (height, width) of an image."""
    assert data.latents is not None
    height, width = (int(side) for side in data.images.pixels.shape[1:3])
    return data.latents.latent_shape, (height, width)


@dataclass(frozen=True)
class Trial:
    """What a judgement by retraining works with: what every method says of the queries and took for it.

    And what trains and measures models, and attributes under them.
    """

    rankings: dict[str, list[Scores]]
    costs: dict[str, Cost]
    sweep: Sweep
    again: Reattribution


def prepare_trial(config: Any, seed: int, timesteps: int) -> Trial:
    """Draws the queries from the model with all images, attributes them by every method, and plans the sweep."""
    methods = methods_of(config)
    output, module = Path(config.output), config.data
    runner, console, store = Runner.current(), Console(), Store(config.store)
    recipe = Recipe(str(config.recipe.absolute), store.root)
    module.store = store
    module.prepare_data()
    module.setup()
    data = training_data_of(module)
    assert data.latents is not None
    models = RetrainedModels(store, recipe.identity(), data.latents.ids, data.latents.fingerprint, recipe.train)
    if config.model is not None:
        models.publish(RetrainingJob((), seed), Path(config.model))
    console.log("the model with all images")
    model = models.model(RetrainingJob((), seed)).to(runner.device)
    keep_trajectory = any("trajectory" in method.requires for method in methods.values())
    source: QuerySource = replace(config.queries, prompts=[*config.queries.prompts, *config.also])
    latent_shape, size = shapes(data)
    drawn = make_queries(
        model,
        source=source,
        latent_shape=latent_shape,
        size=size,
        progress=console.progress,
        keep_trajectory=keep_trajectory,
    )
    panel = Panel(drawn, model, source, timesteps, config.similarity)
    queries = drawn[: len(drawn) - len(config.also)]
    rankings, costs = {}, {}
    common: dict[str, Any] = {"store": store, "runner": runner, "options": config.report, "log": console.log}
    for name, method in methods.items():
        console.log(name)
        method.progress = console.progress
        rankings[name], costs[name] = attribute_at_cost(
            output / name, method=method, data=data, model=model, queries=queries, **common
        )
    table = MeasurementTable(Path(config.measurements or output / "retrains.parquet"))
    engine, images = config.workers.get(), images_folder(output)
    sweep = Sweep(models, panel=panel, table=table, engine=engine, log=console.log, images=images)
    return Trial(
        rankings,
        costs,
        sweep,
        Reattribution(
            reattribution_folder(output), methods=methods, data=data, models=models, queries=queries, **common
        ),
    )
