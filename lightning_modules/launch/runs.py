"""Set-up of runs over queries: processes, model, data and queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning.fabric import Fabric

from datamodules.images import ImageDataModule
from lightning_modules.launch.models import named_model
from lightning_modules.launch.settings import RunSettings
from wherefrom.attributors import Attributor, Query, TrainingData
from wherefrom.commands.stated_generation import checked_queries
from wherefrom.models.adapter_states import known_adapters
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.run_size import RunSize, check_latents
from wherefrom.queries.sources import make_queries
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Console
from wherefrom.runtime.distributed import Runner


def training_data(data: ImageDataModule, model: DiffusionModel) -> TrainingData:
    """The training images and the held-out ones, with their latents by the model's own encoder."""
    data.encoder = model.encoder
    data.take_size(model)
    data.prepare_data()
    data.setup()
    made = training_data_of(data)
    for latents in (made.latents, made.held_out_latents):
        if latents is not None and model.encoder is not None:
            check_latents(latents, model)
    return made


def training_data_of(data: ImageDataModule) -> TrainingData:
    """The training images and the held-out ones of a module that is set up."""
    held_out = data.validation_images if len(data.validation_images) else None
    return TrainingData(
        data.train_images, data.train_latents, held_out, data.validation_latents if held_out is not None else None
    )


@dataclass(frozen=True)
class Run:
    """What a run over queries works with.

    Attributes:
        model: The model, on this process's device.
        data: Training and held-out images with their latents.
        queries: The queries.
        store: Where methods keep what they make.
        runner: This process's place.
        console: Lines and bars of the main process.
    """

    model: DiffusionModel
    data: TrainingData
    queries: list[Query]
    store: Store
    runner: Runner
    console: Console


def prepare(
    settings: RunSettings,
    model_name: str,
    methods: Iterable[Attributor],
    with_queries: bool = True,
    lora: Sequence[str] = (),
) -> Run:
    """Launches the processes and makes model, data and the queries, with what the methods need of them.

    Args:
        settings: The command's.
        model_name: Folder or hub id of the model.
        methods: The methods, which say whether the queries' sampling trajectories are kept.
        with_queries: Make the queries that the settings name.
        lora: Adapters that are added to the model.
    """
    devices = settings.trainer
    fabric = Fabric(
        accelerator=devices.accelerator, strategy=devices.strategy, devices=devices.devices, num_nodes=devices.num_nodes
    )
    fabric.launch()
    runner = Runner.current(fabric.device)
    console = Console(runner.is_main)
    model = devices.accelerate(named_model(model_name, lora).to(fabric.device))
    for adapter in known_adapters(model.denoiser):
        console.log(f"with LoRA {adapter}")
    for note in model.notes:
        console.log(note)
    data_module = settings.data
    data_module.store = store = Store(settings.store)
    console.log("images, latents and captions")
    if runner.is_main:
        training_data(data_module, model)
    runner.barrier()
    data = training_data(data_module, model)
    if not with_queries:
        return Run(model, data, [], store, runner, console)
    console.log("queries")
    run = data_module.take_size(model)
    if run is not None and run.line():
        console.log(run.line())
    latent_shape, size = shapes(data, run)
    keep_trajectory = any("trajectory" in method.requires for method in methods)
    queries = make_queries(
        model,
        source=settings.queries,
        latent_shape=latent_shape,
        size=size,
        progress=console.progress,
        keep_trajectory=keep_trajectory,
    )
    queries = checked_queries(queries, model, log=console.log)
    return Run(model, data, queries, store, runner, console)


def shapes(data: TrainingData, size: RunSize | None = None) -> tuple[tuple[int, int, int], RunSize | tuple[int, int]]:
    """(C, H, W) of a drawn latent, and the size of the queries' images.

    Args:
        data: The training images.
        size: The run's size; None takes that of the training images.
    """
    if size is not None:
        return size.latent_shape, size
    assert data.latents is not None
    height, width = (int(side) for side in data.images.pixels.shape[1:3])
    return data.latents.latent_shape, (height, width)
