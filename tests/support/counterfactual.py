"""Counterfactual evaluation of tiny random models: what is left out and the seed decide the weights, untrained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from datamodules import ImageFolder
from lightning_modules.launch import runs
from tests.support.tiny import LENGTH, one_process, text_folder, tiny_folder, tiny_pipeline, tiny_schedule, tiny_unet
from wherefrom.attributors import Attributor, InfluenceFunction, Scores
from wherefrom.counterfactual.measurements import MeasurementTable
from wherefrom.counterfactual.query_panel import Panel
from wherefrom.counterfactual.reattribution import Reattribution
from wherefrom.counterfactual.retraining import RetrainedModels, RetrainingJob
from wherefrom.counterfactual.sweep import Sweep
from wherefrom.curvature import Identity
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.encoders import LatentEncoder
from wherefrom.models.pipeline import save_pipeline
from wherefrom.queries.sources import QuerySource, generate
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.keyed_random import hash_text

SOURCE = QuerySource(prompts=["red square", "blue circle", "a big stripe"], sampling_steps=2)


def quick_influence() -> Attributor:
    """A method that asks a model, in moments."""
    return InfluenceFunction(noise_samples=2, grid=LossGrid(timesteps=1, flips=False), curvature=Identity())


class TinyEvaluation:
    """Images, models, a panel and methods below one folder; `trained` and `logged` list what was.

    It is interrupted as it logs `stop_at`.
    """

    def __init__(self, folder: Path, methods: dict[str, Attributor], count: int = 12, **keywords: Any) -> None:
        images, pipeline = folder / "pictures", folder / "pipeline"
        if not images.exists():
            tiny_folder(images, count)
            tiny_pipeline(pipeline)
        encoder = LatentEncoder(str(pipeline / "vae"), str(text_folder(pipeline)), LENGTH)
        store = Store(folder / "store")
        module = ImageFolder(str(images), encoder=encoder, store=str(store.root))
        module.trains = True
        module.prepare_data()
        module.setup()
        self.folder, self.methods, self.store = folder, methods, store
        self.data = runs.training_data_of(module)
        self.trained: list[RetrainingJob] = []
        self.logged: list[str] = []
        self.stop_at: str | None = None

        def train(job: RetrainingJob, place: Path) -> None:
            self.trained.append(job)
            seed = hash_text(f"{job.seed}/{'/'.join(sorted(job.exclude))}") % 2**31
            model = DiffusionModel(tiny_unet(seed), tiny_schedule(), encoder)
            save_pipeline(place / "pipeline", model, str(text_folder(pipeline)), torch.float32)

        def log(message: str) -> None:
            self.logged.append(message)
            if message == self.stop_at:
                raise KeyboardInterrupt

        latents = self.data.latents
        assert latents is not None
        self.models = RetrainedModels(store, {"recipe": "random"}, latents.ids, latents.fingerprint, train)
        self.base = self.models.model(RetrainingJob())
        self.queries = generate(
            self.base, prompts=SOURCE.prompts, seed=SOURCE.seed, shape=(4, 4, 4), sampling_steps=SOURCE.sampling_steps
        )
        panel = Panel(self.queries, self.base, SOURCE, timesteps=4)
        table = MeasurementTable(folder / "retrains.parquet")
        self.sweep = Sweep(self.models, panel=panel, table=table, log=log, **keywords)
        self.reattribution = Reattribution(
            folder / "reattribution",
            methods=methods,
            data=self.data,
            models=self.models,
            queries=self.queries,
            store=store,
            runner=one_process(),
            log=log,
        )

    def first(self) -> dict[str, list[Scores]]:
        """Method -> scores of all queries under the model with all images."""
        result = {}
        for name, method in self.methods.items():
            method.fit(self.data, self.base, self.store, one_process())
            result[name] = list(method.score(self.queries))
        return result


def rankings(scores: dict[str, Sequence[Scores]]) -> dict[str, dict[str, list[str]]]:
    """Method -> query -> ids, the most influential first."""
    return {
        method: {each.query.id: [name for name, _ in each.top(len(each.ids))] for each in results}
        for method, results in scores.items()
    }
