"""Estimate time and disk of any of these commands, or of `fit` of train.py, before it runs.

python evaluate.py budget attribute -c configs/experiment/demo.yaml
python evaluate.py budget fit -c configs/experiment/emoji_diffusion.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_modules.launch import budget
from lightning_modules.launch.command_line import parse
from lightning_modules.launch.commands import attribute, compare, counterfactual, curate, customized, lds
from lightning_modules.launch.recipe import TrainMain
from lightning_modules.launch.settings import RunSettings
from wherefrom.commands.budget import as_table
from wherefrom.commands.estimate import Stage
from wherefrom.runtime.console import room

BUDGETED = ("attribute", "compare", "curate", "customized", "counterfactual", "lds", "fit")


def run(words: Sequence[str], train_main: TrainMain) -> None:
    """Prints what the command would take, at rates measured on this machine.

    Args:
        words: A command with all its words.
        train_main: `train.main`.

    Raises:
        ValueError: The command has no budget.
    """
    if not words or words[0] not in BUDGETED:
        raise ValueError(
            f"budget stands before a command with all its words, one of {', '.join(BUDGETED[:-1])} or (of train.py) "
            f"fit; given {' '.join(words) or 'nothing'!r}."
        )
    output, devices = Path(), 1
    if words[0] == "fit":
        stages = budget.of_fit(words[1:], train_main)
    else:
        _, settings = parse(words)
        assert isinstance(settings, RunSettings)
        stages, output = stages_of(settings, train_main), settings.output
        trainer = settings.trainer
        devices = trainer.num_nodes * (trainer.devices if isinstance(trainer.devices, int) else 1)
    print(as_table(stages, devices))
    print(f"\nmeasured on one device, shared by {devices}; what the store holds is not made again; {room(output)}")


def stages_of(settings: RunSettings, train_main: TrainMain) -> list[Stage]:
    """The stages of a command by the kind of its settings."""
    match settings:
        case attribute.Settings():
            return budget.of_attribute(settings)
        case compare.Settings():
            return budget.of_compare(settings)
        case curate.Settings():
            return budget.of_curate(settings)
        case customized.Settings():
            return budget.of_customized(settings)
        case counterfactual.Settings():
            return budget.of_counterfactual(settings, train_main)
        case lds.Settings():
            return budget.of_lds(settings, train_main)
    raise TypeError(f"{type(settings).__name__} has no budget")
