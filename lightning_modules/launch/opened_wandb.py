"""W&B runs of a training, opened before data are read or models loaded: a wrong project fails in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger

from wherefrom.commands.tracking import refused_by_wandb, run_is_open


def open_wandb(loggers: Any) -> list[Any]:
    """Opens the run of each W&B logger of a trainer's settings; elsewhere than on the main process none is opened.

    Args:
        loggers: The trainer's `logger` as its settings name it.

    Raises:
        ValueError: W&B refuses it, or cannot be reached.
    """
    given = loggers if isinstance(loggers, Sequence) and not isinstance(loggers, str) else [loggers]
    opened = []
    for each in given:
        kind = each.get("class_path", "") if isinstance(each, Mapping) or hasattr(each, "get") else ""
        if kind.rpartition(".")[2] == WandbLogger.__name__:
            settings = each.get("init_args") or {}
            arguments = dict(settings.as_dict() if hasattr(settings, "as_dict") else settings)
            arguments |= each.get("dict_kwargs") or {}
            if run_is_open() and arguments.get("reinit") is None:
                arguments["reinit"] = "create_new"  # else it would be the command's own run
            with refused_by_wandb("the logger's project", "its entity"):
                opened.append(WandbLogger(**arguments).experiment)
    return opened


def hand_over(trainer: Trainer, opened: Sequence[Any]) -> None:
    """Gives the trainer's W&B loggers the runs that were opened for them."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    for logger, run in zip(loggers, opened, strict=False):
        logger._experiment = run


def finish(trainer: Trainer) -> None:
    """Finishes the trainer's W&B runs, or the next training of this process would be logged as the same run."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
