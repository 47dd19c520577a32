"""Lineage of trained models as W&B artifacts."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from wherefrom.commands.tracking import log_lineage


class LogArtifacts(Callback):
    """Logs what the module saved (a model, a ranker, a customized model) when a training ends, to every wandb logger.

    Its inputs are the teacher set that a ranker learned from and the ranker that it started from.

    Args:
        upload: Upload the files; else wandb knows them by path, size and hash.
    """

    def __init__(self, upload: bool = False) -> None:
        self.upload = upload

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what the module saved, with its inputs."""
        saved = getattr(pl_module, "save_to", None)
        if saved is None or not trainer.is_global_zero or not Path(saved).exists():
            return  # a run that came back after its last step saves later, and asks again
        data = getattr(trainer, "datamodule", None)
        teachers = [getattr(data, name, None) for name in ("folder", "validation_folder")]
        inputs = {path: "teacher set" for path in teachers if path is not None and (path / "manifest.json").exists()}
        started = getattr(pl_module, "init_from", None)
        if started is not None:
            inputs[Path(started)] = "start"
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                log_lineage(logger.experiment, Path(saved), type(pl_module).__name__, inputs, self.upload)
