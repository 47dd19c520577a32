"""The model that a command names, with remedies in terms of the commands that have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_model
from wherefrom.runtime.cli_errors import option_names

# What the library calls an option -> where it is: a model of several files is put together by the console command.
WORDS: Mapping[str, str] = {
    "the option 'base'": "--base of `wherefrom attribute`",
    "the option 'lora'": "--lora",
}


def named_model(name: str, lora: Sequence[str] = ()) -> DiffusionModel:
    """The model at a path or hub id.

    Args:
        name: The path or hub id.
        lora: Adapters that are added to it.

    Raises:
        ImportError: There is an adapter, but peft is not installed.
        OSError: There is no pipeline at that path.
        ValueError: The path is neither a folder nor a hub id, or the model or an adapter cannot be used.
    """
    with option_names(WORDS):
        return load_model(name, lora=lora)
