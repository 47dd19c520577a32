"""Attributes pictures to the training images that made them.

python evaluate.py attribute -c configs/experiment/demo.yaml
python evaluate.py attribute -c configs/experiment/demo.yaml --queries.prompts '["a fox, twemoji style"]'
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule
from lightning.fabric import Fabric

import datamodules  # noqa: F401  so that YAML may use short class names
from datamodules.pictures import PicturesDataModule
from wherefrom import attributors
from wherefrom.attribution import ReportOptions, attribute
from wherefrom.attributors import Attributor, TrainingData
from wherefrom.diffusion import DiffusionModel
from wherefrom.pipeline import load_model
from wherefrom.progress import Console, duration, forward_rate, peak_memory, room
from wherefrom.queries import QuerySource, make_queries
from wherefrom.runner import Runner
from wherefrom.storage import Store

__all__ = ["attributors", "main"]


@dataclass(frozen=True)
class Devices:
    """Where to run; the same names as the trainer's.

    Attributes:
        accelerator: `auto`, `cpu`, `cuda`, …
        devices: How many on each machine.
        num_nodes: How many machines.
        strategy: `auto` or `ddp`.
    """

    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"


def parser() -> ArgumentParser:
    """The command line."""
    attribute_parser = ArgumentParser(description=attribute.__doc__, parser_mode="omegaconf")
    attribute_parser.add_argument("-c", "--config", action="config", help="an experiment file")
    attribute_parser.add_argument("--model", type=str, required=True, help="diffusers pipeline: folder or hub id")
    attribute_parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    attribute_parser.add_subclass_arguments(Attributor, "attributor", required=True)
    attribute_parser.add_class_arguments(QuerySource, "queries")
    attribute_parser.add_class_arguments(ReportOptions, "report")
    attribute_parser.add_class_arguments(Devices, "trainer")
    attribute_parser.add_argument("--output", type=str, required=True, help="the run folder")
    attribute_parser.add_argument("--store", type=str, default="cache", help="folder for what is computed once")
    root = ArgumentParser(description=__doc__)
    root.add_subcommands().add_subcommand("attribute", attribute_parser)
    return root


def training_data(data: PicturesDataModule, model: DiffusionModel) -> TrainingData:
    """The training pictures and the held-out ones, with their latents by the model's own encoder."""
    data.encoder = model.encoder
    data.prepare_data()
    data.setup()
    held_out = data.validation_pictures if len(data.validation_pictures) else None
    return TrainingData(
        data.train_pictures, data.train_latents, held_out, data.validation_latents if held_out is not None else None
    )


def announce(
    console: Console, attributor: Attributor, data: TrainingData, model: DiffusionModel, queries: int, output: Path
) -> None:
    """Prints time, memory and disk before anything long starts."""
    work = attributor.work(data, queries)
    if work.per_query == 0 or data.latents is None:
        return
    rate = forward_rate(model, data.latents)
    console.say(
        f"estimate at {rate:,.0f} forward passes a second: {duration(work.once / rate)} once for this model, then "
        f"{duration(work.per_query / rate)} for each of {queries} queries; {work.disk / 2**20:,.0f} MiB on disk, about "
        f"{(work.memory + peak_memory()) / 2**30:.1f} GiB of memory; {room(output)}"
    )


def run_attribute(config: Any) -> None:
    """`evaluate.py attribute`."""
    devices: Devices = config.trainer
    fabric = Fabric(
        accelerator=devices.accelerator, strategy=devices.strategy, devices=devices.devices, num_nodes=devices.num_nodes
    )
    fabric.launch()
    runner = Runner.current(fabric.device)
    console = Console(runner.is_main)
    model = load_model(config.model).to(fabric.device)
    data_module: PicturesDataModule = config.data
    data_module.store = store = Store(config.store)
    console.say("pictures, latents and captions")
    if runner.is_main:
        training_data(data_module, model)
    runner.barrier()
    data = training_data(data_module, model)
    assert data.latents is not None
    height, width = (int(side) for side in np.asarray(data.pictures.pixels).shape[1:3])
    channels, rows, columns = (int(side) for side in data.latents.latents.shape[2:])
    console.say("queries")
    queries = make_queries(model, config.queries, (channels, rows, columns), (height, width), console.progress)
    output = Path(config.output)
    if runner.is_main:
        announce(console, config.attributor, data, model, len(queries), output)
    config.attributor.progress = console.progress
    attribute(output, config.attributor, data, model, queries, store, runner, config.report, console.say)
    console.say(f"report: {output / 'report.html'}   ranking: {output / 'ranking.parquet'}")
    console.say(f"peak resident memory: {peak_memory() / 2**30:.2f} GiB")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake is one line, not a traceback."""
    root = parser()
    config = root.parse_args(args)
    torch.set_float32_matmul_precision("high")
    initialised = root.instantiate(config)
    try:
        run_attribute(initialised.attribute)
    except (ValueError, OSError) as error:
        if args is not None:
            raise  # called from Python: the caller handles it
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
