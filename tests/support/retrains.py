"""Retrained models of a tiny recipe, and what was trained."""

from __future__ import annotations

from pathlib import Path

import train
from datamodules import ImageFolder
from lightning_modules.launch import runs
from lightning_modules.launch.recipe import Recipe
from tests.support.tiny import LENGTH, text_folder
from wherefrom.counterfactual.measurements import MeasurementsByQuery, MeasurementTable
from wherefrom.counterfactual.query_panel import Panel
from wherefrom.counterfactual.retraining import RetrainedModels, RetrainingJob
from wherefrom.counterfactual.sweep import Sweep
from wherefrom.models.encoders import LatentEncoder
from wherefrom.queries.sources import QuerySource
from wherefrom.runtime.artifacts import Store

SOURCE = QuerySource(prompts=["red square", "blue circle"], sampling_steps=2)


class Retraining:
    """Retrained models of the recipe in a store of their own, and what they trained."""

    def __init__(self, recipe_file: Path, store: Path) -> None:
        pipeline = recipe_file.parent / "pipeline"
        encoder = LatentEncoder(str(pipeline / "vae"), str(text_folder(pipeline)), LENGTH)
        module = ImageFolder(str(recipe_file.parent / "pictures"), encoder=encoder, store=str(store))
        module.trains = True
        module.prepare_data()
        module.setup()
        self.data = runs.training_data_of(module)
        recipe, self.trained = Recipe(recipe_file, store, train.main), []
        assert self.data.latents is not None

        def train_one(job: RetrainingJob, place: Path) -> None:
            self.trained.append(job)
            recipe.train(job, place)

        self.store = Store(store)
        latents = self.data.latents
        self.models = RetrainedModels(self.store, recipe.identity(), latents.ids, latents.fingerprint, train_one)

    def measure(self, job: RetrainingJob, panel: Panel, table: MeasurementTable) -> MeasurementsByQuery:
        return Sweep(self.models, panel=panel, table=table).measure([job])[job]
