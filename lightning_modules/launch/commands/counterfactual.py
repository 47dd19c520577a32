"""Evaluate methods by retraining without the images that each names.

python evaluate.py counterfactual -c configs/experiment/emoji_1k_judge.yaml
"""

from __future__ import annotations

from dataclasses import dataclass

from jsonargparse import ArgumentParser

from lightning_modules.launch.arguments import add_trial
from lightning_modules.launch.outputs import Outputs
from lightning_modules.launch.recipe import TrainMain
from lightning_modules.launch.settings import TrialSettings
from lightning_modules.launch.trials import prepare_trial
from wherefrom.counterfactual.effect_table import as_table
from wherefrom.counterfactual.evaluate import evaluate_counterfactual
from wherefrom.counterfactual.protocol import Protocol
from wherefrom.counterfactual.report import write_counterfactual_report


@dataclass(frozen=True, kw_only=True)
class Settings(TrialSettings):
    """Settings of `evaluate.py counterfactual`.

    Attributes:
        protocol: Which models are retrained.
    """

    protocol: Protocol


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_trial(parser)
    parser.add_class_arguments(Protocol, "protocol")


def run(settings: Settings, train_main: TrainMain) -> Outputs:
    """Retrains, measures, and prints the table.

    Args:
        settings: The command's.
        train_main: `train.main`, which runs the recipe.
    """
    protocol = settings.protocol
    trial = prepare_trial(settings, train_main, protocol.seeds[0], protocol.timesteps)
    rows = evaluate_counterfactual(
        settings.output,
        rankings=trial.rankings,
        sweep=trial.sweep,
        protocol=protocol,
        reattribution=trial.reattribution,
        costs=trial.costs,
    )
    print(as_table(rows, trial.costs))
    write_counterfactual_report(settings.output)
    return Outputs()
