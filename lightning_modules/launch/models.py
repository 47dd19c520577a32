"""The model that a command names, with remedies in terms of the commands that have them."""

from __future__ import annotations

from collections.abc import Mapping

from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_model
from wherefrom.runtime.cli_errors import option_names

# What the library calls an option -> where it is: a model of several files is put together by the console command.
WORDS: Mapping[str, str] = {
    "the option 'base'": "--base of `wherefrom attribute`",
    "the option 'lora'": "--lora of `wherefrom attribute`",
}


def named_model(name: str) -> DiffusionModel:
    """The model at a path or hub id.

    Raises:
        OSError: There is no pipeline at that path.
        ValueError: The path is neither a folder nor a hub id, or the model cannot be used.
    """
    with option_names(WORDS):
        return load_model(name)
