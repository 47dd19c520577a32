"""Set-up of evaluations that retrain: attributed queries, and a sweep over retrained models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_modules.launch.recipe import Recipe, TrainMain
from lightning_modules.launch.recipe_images import check_recipe_images
from lightning_modules.launch.runs import shapes, training_data_of
from lightning_modules.launch.settings import TrialSettings
from wherefrom.attributors import Scores
from wherefrom.commands.compare import attribute_at_cost
from wherefrom.commands.stated_generation import checked_queries
from wherefrom.counterfactual.generated_images import images_folder
from wherefrom.counterfactual.measurements import MeasurementTable
from wherefrom.counterfactual.query_panel import Panel
from wherefrom.counterfactual.reattribution import Reattribution, reattribution_folder
from wherefrom.counterfactual.retraining import RetrainedModels, RetrainingJob
from wherefrom.counterfactual.sweep import Sweep
from wherefrom.queries.sources import make_queries
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Console
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.measured_cost import Cost

TABLE = "retrains.parquet"


@dataclass(frozen=True)
class Trial:
    """What an evaluation by retraining works with.

    Attributes:
        rankings: Method -> scores of all queries.
        costs: Method -> what these took.
        sweep: Trains models and measures the queries on them.
        reattribution: Attributes under retrained models.
    """

    rankings: dict[str, list[Scores]]
    costs: dict[str, Cost]
    sweep: Sweep
    reattribution: Reattribution


def measurements_of(settings: TrialSettings) -> MeasurementTable:
    """The run's own table, which also finds what the named tables hold.

    Raises:
        ValueError: A named table is not there.
    """
    named = settings.measurements or []
    tables = [Path(name) for name in ([named] if isinstance(named, str) else named)]
    own = (settings.output if settings.results is None else Path(settings.results)) / TABLE
    missing = [table for table in tables if table != own and not table.is_file()]
    if missing:
        raise ValueError(
            f"measurements: {missing[0]} is not there. It names tables of earlier sweeps, which are only read; new "
            f"measurements go to {own}: leave it out, or choose their folder by --results."
        )
    return MeasurementTable(own, tables)


def prepare_trial(settings: TrialSettings, train_main: TrainMain, seed: int, timesteps: int) -> Trial:
    """Draws the queries from the model with all images, attributes them by every method, and plans the sweep.

    Args:
        settings: The command's.
        train_main: `train.main`, which runs the recipe.
        seed: Of the model with all images.
        timesteps: Timesteps of the queries' losses.
    """
    table = measurements_of(settings)
    methods, output, module = settings.methods, settings.output, settings.data
    runner, console, store = Runner.current(), Console(), Store(settings.store)
    recipe = Recipe(settings.recipe, store.root, train_main)
    module.store, module.trains = store, True  # what the recipe holds out is not ranked either
    module.prepare_data()
    module.setup()
    data = training_data_of(module)
    check_recipe_images(recipe, data.images, store)
    assert data.latents is not None
    models = RetrainedModels(
        store, recipe.identity(), data.latents.ids, data.latents.weighted_fingerprint, recipe.train
    )
    if settings.model is not None:
        models.publish(RetrainingJob((), seed), Path(settings.model))
    console.log("the model with all images")
    model = models.model(RetrainingJob((), seed)).to(runner.device)
    keep_trajectory = any("trajectory" in method.requires for method in methods.values())
    source = replace(settings.queries, prompts=[*settings.queries.prompts, *settings.also])
    latent_shape, size = shapes(data)
    drawn = make_queries(
        model,
        source=source,
        latent_shape=latent_shape,
        size=size,
        progress=console.progress,
        keep_trajectory=keep_trajectory,
    )
    drawn = checked_queries(drawn, model, log=console.log)
    panel = Panel(drawn, model, source, timesteps, settings.similarity)
    queries = drawn[: len(drawn) - len(settings.also)]
    rankings, costs = {}, {}
    common: dict[str, Any] = {"store": store, "runner": runner, "options": settings.report, "log": console.log}
    for name, method in methods.items():
        console.log(name)
        method.progress = console.progress
        rankings[name], costs[name] = attribute_at_cost(
            output / name, method=method, data=data, model=model, queries=queries, **common
        )
    engine, images = settings.workers.get(), images_folder(output)
    sweep = Sweep(models, panel=panel, table=table, engine=engine, log=console.log, images=images)
    return Trial(
        rankings,
        costs,
        sweep,
        Reattribution(
            reattribution_folder(output), methods=methods, data=data, models=models, queries=queries, **common
        ),
    )
