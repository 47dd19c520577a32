"""Data modules from their configurations, and the prompts that a training set is asked about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser
from lightning import LightningDataModule

import datamodules  # noqa: F401  so that YAML may use short class names
from datamodules.images import ImageDataModule
from wherefrom.data.image_set import ImageSet
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.keyed_random import hash_text


def made_data_module(config: Mapping[str, Any] | str, store: Store) -> ImageDataModule:
    """The data module of a configuration or of a file, in a store; nothing is built yet."""
    parser = ArgumentParser(parser_mode="omegaconf")
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    given = parser.parse_args(["--data", config]) if isinstance(config, str) else parser.parse_object({"data": config})
    module: ImageDataModule = parser.instantiate(given).data
    module.store = store
    return module


def data_module(config: Mapping[str, Any], store: Store) -> ImageDataModule:
    """A recipe's data module, set up in a store."""
    module = made_data_module(config, store)
    module.prepare_data()
    module.setup()
    return module


def choose_prompts(images: ImageSet, count: int, seed: int) -> list[int]:
    """Positions of `count` training images of distinct concepts, chosen by keyed hash.

    Every chosen concept has a caption in every style, and captions are distinct.

    Raises:
        ValueError: The training images hold fewer such concepts.
    """
    concepts = images.columns["concept"]
    styles = images.columns.get("style", ("",) * len(images))
    splits = images.columns.get("split", ("train",) * len(images))
    captions_of: dict[str, dict[str, str]] = {}
    for concept, style, captions in zip(concepts, styles, images.captions, strict=True):
        captions_of.setdefault(concept, {})[style] = captions[0]
    chosen: list[int] = []
    seen_concepts: set[str] = set()
    seen_captions: set[str] = set()
    for row in sorted(range(len(images)), key=lambda row: hash_text(f"prompt/{seed}/{images.ids[row]}")):
        own = captions_of[concepts[row]]
        if splits[row] != "train" or concepts[row] in seen_concepts or own.keys() != set(styles):
            continue
        if not seen_captions.isdisjoint(own.values()):
            continue
        chosen.append(row)
        seen_concepts.add(concepts[row])
        seen_captions.update(own.values())
        if len(chosen) == count:
            return chosen
    raise ValueError(
        f"{count} prompts were asked for, but only {len(chosen)} training concepts have a caption of their own in "
        "every style; ask for fewer, or give more images."
    )
