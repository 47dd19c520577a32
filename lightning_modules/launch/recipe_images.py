"""The images that a recipe trains on, which must be those that are ranked."""

from __future__ import annotations

from jsonargparse import ArgumentParser

import datamodules  # noqa: F401  so that recipes may use short class names
from datamodules.images import ImageDataModule
from lightning_modules.launch.recipe import Recipe
from wherefrom.data.image_metadata import shown
from wherefrom.data.image_set import ImageSet
from wherefrom.runtime.artifacts import Store


def recipe_images(recipe: Recipe, store: Store) -> ImageSet:
    """The images that a recipe trains on when none is left out.

    Args:
        recipe: The recipe.
        store: Where its data module keeps images.

    Raises:
        ValueError: Its images cannot be used.
    """
    given = dict(recipe.config["data"])
    given["init_args"] = {**given["init_args"], "encoder": None, "store": str(store.root)}
    parser = ArgumentParser(parser_mode="omegaconf")
    parser.add_subclass_arguments(ImageDataModule, "data", required=True)
    module: ImageDataModule = parser.instantiate(parser.parse_object({"data": given})).data
    module.trains = True
    return module.load()[0]


def check_recipe_images(recipe: Recipe, ranked: ImageSet, store: Store) -> None:
    """Refuses to rank other images than the recipe trains on: effects of leaving them out would be of other sets.

    Args:
        recipe: The recipe.
        ranked: The images that are ranked.
        store: Where its data module keeps images.

    Raises:
        ValueError: The two are not the same images; says how they differ.
    """
    trained = recipe_images(recipe, store)
    only_trained, only_ranked = (sorted({*a.ids} - {*b.ids}) for a, b in ((trained, ranked), (ranked, trained)))
    differing = [
        f"{len(only)} are {what} only ({shown(only)})"
        for only, what in ((only_trained, "trained on"), (only_ranked, "ranked"))
        if only
    ]
    if not differing and trained.fingerprint != ranked.fingerprint:
        differing = ["their pixels or captions differ"]
    if differing:
        raise ValueError(
            f"data: {recipe.file} trains on {len(trained):,} images and {len(ranked):,} are ranked, but these must be "
            f"the same: {'; '.join(differing)}. Give `data` the recipe's settings (folder, options, split, "
            "validation_share), and no `exclude`."
        )
