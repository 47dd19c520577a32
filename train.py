"""Trains any module of `lightning_modules` on any data set of `datamodules`.

python train.py fit -c configs/experiment/emoji_diffusion.yaml
python train.py fit -c configs/experiment/emoji_diffusion.yaml --ckpt_path runs/emoji_diffusion/last.ckpt  # go on
"""

from __future__ import annotations

import sys
import warnings

from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningCLI

import callbacks
import datamodules  # noqa: F401  so that YAML may use short class names
import lightning_modules  # noqa: F401
from wherefrom.commands.curvature_settings import accept_old_curvature, words_in_new_form


def main(args: ArgsType = None, run: bool = True) -> LightningCLI:
    """Runs the command line and returns it with its trainer, model and data.

    Args:
        args: Words of the command line; None takes the program's.
        run: False makes trainer, model and data only; the words then begin after the subcommand.
    """
    accept_old_curvature()
    given = sys.argv[1:] if args is None else args
    words = words_in_new_form(given) if isinstance(given, list) else given
    with warnings.catch_warnings():
        # Lightning suspects a mistake wherever a process with a command line of its own gives arguments, as sweeps do.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        return LightningCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=callbacks.LogConfig,
            parser_kwargs={"parser_mode": "omegaconf"},
            args=words,
            run=run,
        )


if __name__ == "__main__":
    main()
