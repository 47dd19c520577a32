"""Typed settings of evaluate.py's commands, as far as several share them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from datamodules.images import ImageDataModule
from wherefrom.attributors import Attributor
from wherefrom.commands.method_files import load_methods
from wherefrom.commands.tracking import Tracking
from wherefrom.features.base import ImageEncoder
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.sources import QuerySource
from wherefrom.reports.query_section import ReportOptions
from wherefrom.runtime.executors import Workers
from wherefrom.runtime.run_settings import plain

# Settings of data modules that decide no ranking: how training batches are made, and where things are kept.
_NOT_DECIDING = {"store", "batch_size", "seed", "flip_share", "caption_dropout", "encoder"}
_LATER = {
    "split",
    "held_out",
    "captions_file",
}  # settings that records of earlier runs do not hold: written where they are given


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


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of every command over queries.

    Attributes:
        given: All settings of the command as text and numbers, for records of the run.
        data: Training and held-out images; None where a command can do without.
        queries: Images to attribute.
        report: What report pages show.
        trainer: Devices.
        wandb: Where W&B keeps the run.
        output: The run folder.
        store: Folder for what is computed once.
    """

    given: Mapping[str, Any]
    data: ImageDataModule
    queries: QuerySource
    report: ReportOptions
    trainer: Devices
    wandb: Tracking
    output: Path
    store: str

    @classmethod
    def of(cls, parsed: Mapping[str, Any], given: Mapping[str, Any]) -> Self:
        """The settings from what the command line's parser made.

        Args:
            parsed: Name -> value, classes instantiated.
            given: The same, classes named.

        Raises:
            ValueError: A method file, a setting of a method or a variant is wrong.
        """
        values = {field.name: parsed[field.name] for field in fields(cls) if field.name != "given"}
        values["output"] = Path(values["output"])
        if "methods" in values:
            files = [Path(str(file.absolute)) for file in values["methods"]]
            values["methods"] = load_methods(files, parsed["settings"], parsed["variants"], strict=True)
        if "recipe" in values:
            values["recipe"] = Path(str(values["recipe"].absolute))
        return cls(given=given, **values)

    def deciding(self) -> dict[str, Any]:
        """Settings that decide the run's results, for the record in its folder; methods apart."""
        data = dict(self.given["data"] or {})
        arguments = data.get("init_args") or {}
        data["init_args"] = {
            name: value
            for name, value in arguments.items()
            if name not in _NOT_DECIDING and not (name in _LATER and value is None)
        }
        return {"data": plain(data), "queries": plain(self.given["queries"])}

    def identities(self) -> dict[str, dict[str, Any]]:
        """Name -> identity of each method of the run."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ModelSettings(RunSettings):
    """Settings of commands over a model that is given.

    Attributes:
        model: A diffusers pipeline: folder or hub id.
        lora: Adapters that are added to it: files, folders or hub ids, with `:WEIGHT` or not.
    """

    model: str
    lora: list[str]

    def deciding(self) -> dict[str, Any]:
        """Also the model and what is added to it."""
        return {**super().deciding(), "model": plain(self.model), **({"lora": self.lora} if self.lora else {})}


@dataclass(frozen=True, kw_only=True)
class MethodSettings(RunSettings):
    """Settings of commands over several methods.

    Attributes:
        methods: Name -> method.
    """

    methods: Mapping[str, Attributor]

    def identities(self) -> dict[str, dict[str, Any]]:
        """Name -> identity of each method of the run."""
        return {name: method.identity() for name, method in self.methods.items()}


@dataclass(frozen=True, kw_only=True)
class TrialSettings(MethodSettings):
    """Settings of the evaluations that retrain.

    Attributes:
        model: Folder of the recipe's model of all images; None trains it.
        also: Prompts of further images that every model is measured on.
        workers: Where models are trained.
        recipe: An experiment file of train.py fit.
        similarity: Compares images by their features also.
        measurements: Tables of what earlier sweeps measured; they are only read.
        results: Folder whose `retrains.parquet` receives new measurements; None is the run folder.
    """

    model: str | None
    also: list[str]
    workers: Workers
    recipe: Path
    similarity: ImageEncoder | None
    measurements: str | list[str] | None
    results: str | None
