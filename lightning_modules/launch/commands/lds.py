"""Compute linear datamodeling scores on models of random training subsets.

python evaluate.py lds -c configs/experiment/emoji_1k_lds.yaml
"""

from __future__ import annotations

from dataclasses import dataclass

from jsonargparse import ArgumentParser

from lightning_modules.launch.arguments import add_trial
from lightning_modules.launch.outputs import Outputs
from lightning_modules.launch.recipe import TrainMain
from lightning_modules.launch.settings import TrialSettings
from lightning_modules.launch.trials import prepare_trial
from wherefrom.counterfactual.datamodeling_experiment import RandomSubsets, as_table, linear_datamodeling_score


@dataclass(frozen=True, kw_only=True)
class Settings(TrialSettings):
    """Settings of `evaluate.py lds`.

    Attributes:
        random_subsets: Which subsets are trained on.
        timesteps: Timesteps of the queries' losses.
    """

    random_subsets: RandomSubsets
    timesteps: int


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_trial(parser)
    parser.add_class_arguments(RandomSubsets, "random_subsets")
    parser.add_argument("--timesteps", type=int, default=200, help="timesteps of the queries' losses")


def run(settings: Settings, train_main: TrainMain) -> Outputs:
    """Trains on the subsets, measures, and prints the table.

    Args:
        settings: The command's.
        train_main: `train.main`, which runs the recipe.
    """
    trial = prepare_trial(settings, train_main, settings.random_subsets.seed, settings.timesteps)
    scores = linear_datamodeling_score(settings.output, trial.rankings, trial.sweep, settings.random_subsets)
    print(as_table(scores))
    return Outputs()
