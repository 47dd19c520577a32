"""Trains any module of `lightning_modules` on any data set of `datamodules`.

python train.py fit -c configs/experiment/emoji_diffusion.yaml
python train.py fit -c configs/experiment/emoji_diffusion.yaml --ckpt_path runs/emoji_diffusion/checkpoints/last.ckpt
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

import callbacks
import datamodules  # noqa: F401  so that YAML may use short class names
import lightning_modules  # noqa: F401
from lightning_modules.launch.committed import places_of_training, refuse_committed
from lightning_modules.launch.opened_wandb import hand_over, open_wandb
from lightning_modules.launch.words import DATA_WORDS
from lightning_modules.result import LeavesResult
from lightning_modules.whole_checkpoints import WholeCheckpoints, readable_checkpoint
from wherefrom.commands.curvature_settings import accept_old_curvature, words_in_new_form
from wherefrom.runtime.cli_errors import mistakes_in_one_line, option_names
from wherefrom.runtime.renamed_settings import accepting_old_names


class CommandLine(LightningCLI):
    """Lightning's command line, which accepts old names and writes committed weights only where `--weights` asks."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--weights`."""
        parser.add_argument(
            "--weights", type=str | None, help="save the trained model here instead of model.init_args.save_to"
        )

    def instantiate_classes(self) -> None:
        """Opens W&B where a logger asks for it, then makes model, data and trainer."""
        opened = open_wandb(self._get(self.config, "trainer", default={}).get("logger")) if self.subcommand else []
        try:
            super().instantiate_classes()
        except BaseException:
            for run in opened:
                run.finish(exit_code=1)
            raise
        hand_over(self.trainer, opened)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with checkpoints that are whole or absent unless the settings name others."""
        given = self._get(self.config_init, "trainer", default={}).get("plugins") or []
        plugins = given if isinstance(given, list) else [given]
        if not any(isinstance(each, CheckpointIO) for each in plugins):
            kwargs = {"plugins": [*plugins, WholeCheckpoints()], **kwargs}
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Saves the result of a run that came back after its last step, for which Lightning calls no hook."""
        if not isinstance(self.model, LeavesResult) or self.model.left:
            return
        rank_zero_info("Training had come to its last step before; what it leaves is saved now.")
        if is_overridden("validation_step", self.model):
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        self.model.save_result()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, callbacks.LogArtifacts):
                callback.on_fit_end(self.trainer, self.model)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the words, and refuses to write to the checkout's weights/ or results/ unless they name it."""
        words = sys.argv[1:] if args is None else args
        if not isinstance(words, list):
            super().parse_arguments(parser, args)
            return
        self._parse_words(parser, words)

    def _parse_words(self, parser: LightningArgumentParser, words: list[str]) -> None:
        accept_old_curvature()
        with accepting_old_names(words) as renamed:
            current = words_in_new_form(renamed)
            super().parse_arguments(parser, current)
        config = self.config[self.config.subcommand] if "subcommand" in self.config else self.config
        weights = config.pop("weights", None)  # asks for this run only: the saved config.yaml does not hold it
        if weights is not None:
            config.model.init_args.save_to = weights
        checkpoint = config.get("ckpt_path")
        if checkpoint is not None and Path(checkpoint).is_file():  # else a word or a place that Lightning knows
            config.ckpt_path = str(readable_checkpoint(Path(checkpoint)))
        for name, place in places_of_training(config.as_dict()).items():
            flags = [f"--{name}", "--model.save_to"] if " of " not in name else [f"--{name.split()[-1]}"]
            refuse_committed(place, name, ["--weights", *flags] if name.endswith("save_to") else flags, current)


def main(args: ArgsType = None, run: bool = True) -> LightningCLI:
    """Runs the command line and returns it with its trainer, model and data.

    Args:
        args: Words of the command line; None takes the program's.
        run: False makes trainer, model and data only; the words then begin after the subcommand.
    """
    in_one_line = mistakes_in_one_line(called_from_python=args is not None)
    with warnings.catch_warnings(), in_one_line, option_names(DATA_WORDS):
        # Lightning suspects a mistake wherever a process with a command line of its own gives arguments, as sweeps do.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        return CommandLine(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=callbacks.LogConfig,
            parser_kwargs={"parser_mode": "omegaconf"},
            args=args,
            run=run,
        )


if __name__ == "__main__":
    main()
