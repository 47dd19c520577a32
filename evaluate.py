"""Attributes images to the training images that made them, compares methods, and judges them by retraining.

python evaluate.py attribute -c configs/experiment/demo.yaml
python evaluate.py attribute -c configs/experiment/demo.yaml --queries.prompts '["a fox, twemoji style"]'
python evaluate.py compare -c configs/experiment/emoji_comparison.yaml
python evaluate.py retrieval --teacher RUN --rankings fast=RUN --output FOLDER  # mAP and Recall against a slow method
python evaluate.py counterfactual -c EXPERIMENT  # train again without what each method names
python evaluate.py lds -c EXPERIMENT             # train on random halves
python evaluate.py report --output RUN           # the judge's page and curves once more
python evaluate.py curate -c configs/experiment/emoji_1k_teacher.yaml  # rankings that a fast ranker learns from
python evaluate.py calibrate --ranker R --teacher T --output F  # what a ranker's similarities say of influence
python evaluate.py customized -c EXPERIMENT      # find what models were customized on, among other images
python evaluate.py budget COMMAND …              # what any of these would take, or `fit …` of train.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import Path_fr
from lightning import LightningDataModule

import datamodules  # noqa: F401  so that YAML may use short class names
from lightning_modules.launch import budget
from lightning_modules.launch.runs import Devices, prepare, prepare_trial, shapes
from wherefrom import attributors
from wherefrom.attributors import Attributor, Scores
from wherefrom.commands import customization_benchmark, customization_tasks, evaluate_retrieval
from wherefrom.commands.attribute import attribute
from wherefrom.commands.budget import as_table
from wherefrom.commands.compare import compare
from wherefrom.commands.curate import Captions, curate
from wherefrom.commands.curvature_settings import accept_old_curvature, words_in_new_form
from wherefrom.commands.estimate import announce
from wherefrom.commands.method_files import methods_of
from wherefrom.commands.tracking import Tracking, track
from wherefrom.counterfactual import datamodeling_experiment, evaluate
from wherefrom.counterfactual.datamodeling_experiment import Halves, linear_datamodeling_scores
from wherefrom.counterfactual.evaluate import judge
from wherefrom.counterfactual.protocol import Protocol
from wherefrom.counterfactual.report import write_judge_report
from wherefrom.data.image_set import ImageSet
from wherefrom.distillation.calibration import CalibrationSettings, calibrate_ranker
from wherefrom.features.base import ImageEncoder, TextEncoder
from wherefrom.queries.sources import QuerySource
from wherefrom.reports.query_section import ReportOptions
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.cli_errors import mistakes_in_one_line
from wherefrom.runtime.console import peak_memory, room
from wherefrom.runtime.executors import Workers

__all__ = ["attributors", "main"]

TRIALS = ("counterfactual", "lds")
BUDGETED = ("attribute", "compare", "curate", "customized", *TRIALS)


@dataclass(frozen=True)
class Done:
    """What a command leaves for wandb to know.

    Attributes:
        store: What it found or made on its way.
        results: Scores of its queries.
        images: The training images.
        is_main: Whether this process tells.
    """

    store: Store | None = None
    results: Sequence[Scores] = ()
    images: ImageSet | None = None
    is_main: bool = True


def parser() -> ArgumentParser:
    """The command line."""
    attribute_parser = run_parser(attribute.__doc__)
    attribute_parser.add_subclass_arguments(Attributor, "attributor", required=True)
    attribute_parser.add_argument(
        "--cut", type=int | None, help="rank only the first so many; all scores go to parquet parts beside the ranking"
    )
    compare_parser = run_parser(compare.__doc__)
    add_methods(compare_parser)
    counterfactual_parser = trial_parser(judge.__doc__)
    counterfactual_parser.add_class_arguments(Protocol, "protocol")
    lds_parser = trial_parser(linear_datamodeling_scores.__doc__)
    lds_parser.add_class_arguments(Halves, "halves")
    lds_parser.add_argument("--timesteps", type=int, default=200, help="timesteps of the queries' losses")
    curate_parser = run_parser(curate.__doc__)
    curate_parser.add_subclass_arguments(Attributor, "teacher", required=True)
    curate_parser.add_subclass_arguments(Attributor, "nearest", required=False)
    curate_parser.add_class_arguments(Captions, "captions")
    curate_parser.add_argument("--features", type=dict[str, ImageEncoder | TextEncoder], required=True)
    curate_parser.add_argument("--k", type=int | None, help="candidates of each query: the nearest so many")
    curate_parser.add_argument("--subsample", type=int | None, help="score only so many of these")
    curate_parser.add_argument("--block_size", type=int, default=16, help="queries that a worker is given at a time")
    curate_parser.add_class_arguments(Workers, "workers")
    retrieval_parser = run_parser(evaluate_retrieval.retrieval.__doc__, required=False)
    retrieval_parser.add_argument(
        "--teacher", type=str, required=True, help="run folder or teacher set, whole rankings"
    )
    retrieval_parser.add_argument("--ceiling", type=str | None, help="the teacher's, other noise or another model seed")
    retrieval_parser.add_argument("--rankings", type=str, nargs="+", default=[], help="name=folder of what is measured")
    add_methods(retrieval_parser, required=False)
    retrieval_parser.add_argument(
        "--k",
        type=list[float],
        default=list(evaluate_retrieval.DEPTHS),
        help="numbers, or below 1 shares of the training set",
    )
    customized_parser = run_parser(customization_benchmark.benchmark.__doc__)
    customized_parser.add_argument("--tasks", type=list[str], required=True, help="AbU's task list, or AbC's files")
    customized_parser.add_argument("--root", type=str, required=True, help="what the tasks' paths are relative to")
    customized_parser.add_argument(
        "--styles", type=list[str], default=[], help="test cases whose models learned styles"
    )
    add_methods(customized_parser)
    customized_parser.add_argument(
        "--words", type=list[customization_benchmark.Words], default=["with"], help="V* in the prompts: with, without"
    )
    customized_parser.add_argument("--k", type=int, default=10, help="of Recall@k")
    customized_parser.add_argument("--limit", type=int | None, help="only the first so many models of each test case")
    calibrate_parser = ArgumentParser(description=calibrate_ranker.__doc__)
    calibrate_parser.add_argument("--ranker", type=Path, required=True, help="the ranker's folder")
    calibrate_parser.add_argument("--teacher", type=Path, required=True, help="a teacher set of held-out queries")
    calibrate_parser.add_argument("--output", type=Path, required=True, help="where the calibration goes")
    calibrate_parser.add_class_arguments(CalibrationSettings, "settings")
    report_parser = ArgumentParser(description=write_judge_report.__doc__)
    report_parser.add_argument(
        "--output", type=str, required=True, help="the run folder of `evaluate.py counterfactual`"
    )
    root = ArgumentParser(description=__doc__)
    commands = root.add_subcommands()
    commands.add_subcommand("counterfactual", counterfactual_parser)
    commands.add_subcommand("lds", lds_parser)
    commands.add_subcommand("report", report_parser)
    commands.add_subcommand("curate", curate_parser)
    commands.add_subcommand("calibrate", calibrate_parser)
    commands.add_subcommand("attribute", attribute_parser)
    commands.add_subcommand("compare", compare_parser)
    commands.add_subcommand("retrieval", retrieval_parser)
    commands.add_subcommand("customized", customized_parser)
    return root


def run_parser(description: str | None, with_model: bool = True, required: bool = True) -> ArgumentParser:
    """What all runs over queries are told; the judge trains its model itself, and kept rankings need neither."""
    accept_old_curvature()
    made = ArgumentParser(description=description, parser_mode="omegaconf")
    made.add_argument("-c", "--config", action="config", help="an experiment file")
    if with_model:
        model_type = str if required else str | None
        made.add_argument("--model", type=model_type, required=required, help="diffusers pipeline: folder or hub id")
    made.add_subclass_arguments(LightningDataModule, "data", required=required)
    made.add_class_arguments(QuerySource, "queries")
    made.add_class_arguments(ReportOptions, "report")
    made.add_class_arguments(Devices, "trainer")
    made.add_class_arguments(Tracking, "wandb")
    made.add_argument("--output", type=str, required=True, help="the run folder")
    made.add_argument("--store", type=str, default="cache", help="folder for what is computed once")
    return made


def add_methods(made: ArgumentParser, required: bool = True) -> None:
    """What names a command's methods."""
    named = {"required": True} if required else {"default": []}
    made.add_argument("--methods", type=list[Path_fr], help="attributor files", **named)
    made.add_argument(
        "--settings",
        type=dict[str, Any],
        default={},
        help="replace the files' values in all methods that have them, or in one: {draws: 5, trak/noise_samples: 9}",
    )
    made.add_argument(
        "--variants",
        type=dict[str, dict[str, Any]],
        default={},
        help="further methods, each one of the files with settings of its own: {many_draws: {trak/noise_samples: 90}}",
    )


def trial_parser(description: str | None) -> ArgumentParser:
    """What all judgements by retraining are told."""
    made = run_parser(description, with_model=False)
    made.add_argument(
        "--model", type=str | None, help="where the recipe's model of all images is kept; without it, it is trained"
    )
    made.add_argument(
        "--also", type=list[str], default=[], help="prompts of further images that every model is measured on"
    )
    made.add_class_arguments(Workers, "workers")
    add_methods(made)
    made.add_argument("--recipe", type=Path_fr, required=True, help="an experiment file of train.py fit")
    made.add_subclass_arguments(ImageEncoder, "similarity", required=False)
    made.add_argument("--measurements", type=str, help="the table that a sweep resumes from")
    return made


def run_attribute(config: Any) -> Done:
    """`evaluate.py attribute`."""
    run, output = prepare(config, [config.attributor]), Path(config.output)
    if run.runner.is_main:
        announce(
            run.console,
            attributor=config.attributor,
            data=run.data,
            model=run.model,
            queries=len(run.queries),
            output=output,
        )
    config.attributor.progress = run.console.progress
    results = attribute(
        output,
        attributor=config.attributor,
        data=run.data,
        model=run.model,
        queries=run.queries,
        store=run.store,
        runner=run.runner,
        options=config.report,
        log=run.console.log,
        cut=config.cut,
    )
    run.console.log(f"report: {output / 'report.html'}   ranking: {output / 'ranking.parquet'}")
    run.console.log(f"peak resident memory: {peak_memory() / 2**30:.2f} GiB")
    return Done(run.store, results, run.data.images, run.runner.is_main)


def run_compare(config: Any) -> Done:
    """`evaluate.py compare`."""
    methods = methods_of(config)
    run, output = prepare(config, methods.values()), Path(config.output)
    for name, method in methods.items():
        if run.runner.is_main:
            run.console.log(name)
            announce(
                run.console, attributor=method, data=run.data, model=run.model, queries=len(run.queries), output=output
            )
        method.progress = run.console.progress
    compare(
        output,
        methods=methods,
        data=run.data,
        model=run.model,
        queries=run.queries,
        store=run.store,
        runner=run.runner,
        options=config.report,
        log=run.console.log,
    )
    run.console.log(f"report: {output / 'report.html'}   table: {output / 'methods.parquet'}")
    return Done(run.store, is_main=run.runner.is_main)


def run_retrieval(config: Any) -> Done:
    """`evaluate.py retrieval`."""
    output = Path(config.output)
    methods = methods_of(config)
    folders = evaluate_retrieval.named_folders([*config.rankings, *(f"{name}={output / name}" for name in methods)])
    if methods:
        if config.model is None or config.data is None:
            raise ValueError("methods: attributors need --model and --data; rankings that are kept need neither.")
        run = prepare(config, methods.values())
        compare(
            output,
            methods=methods,
            data=run.data,
            model=run.model,
            queries=run.queries,
            store=run.store,
            runner=run.runner,
            options=config.report,
            log=run.console.log,
        )
        if not run.runner.is_main:
            return Done(is_main=False)
    ceiling = None if config.ceiling is None else Path(config.ceiling)
    print(
        evaluate_retrieval.as_table(
            evaluate_retrieval.retrieval(output, Path(config.teacher), folders, ceiling, config.k)
        )
    )
    return Done()


def run_counterfactual(config: Any) -> Done:
    """`evaluate.py counterfactual`."""
    protocol: Protocol = config.protocol
    trial = prepare_trial(config, protocol.seeds[0], protocol.timesteps)
    rows = judge(
        Path(config.output),
        rankings=trial.rankings,
        sweep=trial.sweep,
        protocol=protocol,
        again=trial.again,
        costs=trial.costs,
    )
    print(evaluate.as_table(rows, trial.costs))
    write_judge_report(Path(config.output))
    return Done()


def run_calibrate(config: Any) -> None:
    """`evaluate.py calibrate`."""
    result = calibrate_ranker(config.output, config.ranker, config.teacher, config.settings)
    print(f"calibrated on {len(result.queries)} queries, {len(result.low)} bins of similarity: {config.output}")


def run_report(config: Any) -> None:
    """`evaluate.py report`."""
    for path in write_judge_report(Path(config.output)):
        print(path)


def run_lds(config: Any) -> Done:
    """`evaluate.py lds`."""
    halves: Halves = config.halves
    trial = prepare_trial(config, halves.seed, config.timesteps)
    print(
        datamodeling_experiment.as_table(
            linear_datamodeling_scores(Path(config.output), trial.rankings, trial.sweep, halves)
        )
    )
    return Done()


def run_customized(config: Any) -> Done:
    """`evaluate.py customized`."""
    if config.queries.prompts or config.queries.images:
        raise ValueError(
            "evaluate.py customized takes its queries from the tasks: leave queries.prompts and images out."
        )
    methods = methods_of(config)
    tasks = customization_tasks.read_all([Path(file) for file in config.tasks], Path(config.root), config.limit)
    run = prepare(config, methods.values(), with_queries=False)
    for method in methods.values():
        method.progress = run.console.progress
    lines = customization_benchmark.benchmark(
        Path(config.output),
        tasks=tasks,
        styles=config.styles,
        methods=methods,
        base=config.model,
        base_model=run.model,
        background=replace(run.data, held_out=None, held_out_latents=None),
        store=run.store,
        runner=run.runner,
        words=config.words,
        k=config.k,
        options=config.report,
        log=run.console.log,
    )
    if run.runner.is_main:
        print(customization_benchmark.as_table(lines, config.k))
    return Done(run.store, is_main=run.runner.is_main)


def run_curate(config: Any) -> Done:
    """`evaluate.py curate`."""
    if config.queries.prompts or config.queries.images:
        raise ValueError("evaluate.py curate draws its queries from captions: leave queries.prompts and images out.")
    run = prepare(config, [config.teacher], with_queries=False)
    alone = config.workers.engine == "local"
    curate(
        Path(config.output),
        teacher=config.teacher,
        data=run.data,
        model=run.model,
        captions=config.captions,
        source=config.queries,
        shape=shapes(run.data)[0],
        features=config.features,
        store=run.store,
        nearest=config.nearest,
        k=config.k,
        subsample=config.subsample,
        block_size=config.block_size,
        engine=config.workers.get(),
        runner=run.runner if alone else None,
        log=run.console.log,
        progress=run.console.progress if alone else None,
    )
    return Done(run.store, is_main=run.runner.is_main)


def run_budget(words: Sequence[str]) -> None:
    """`evaluate.py budget COMMAND …`: prints what the command would take, at rates measured on this machine.

    Raises:
        ValueError: The command has no budget.
    """
    if not words or words[0] not in (*BUDGETED, "fit"):
        raise ValueError(
            f"budget stands before a command with all its words, one of {', '.join(BUDGETED)} or (of train.py) fit; "
            f"given {' '.join(words) or 'nothing'!r}."
        )
    command, output, devices = words[0], Path(), 1
    if command == "fit":
        stages = budget.of_fit(words[1:])
    else:
        root = parser()
        config = root.instantiate(root.parse_args(list(words)))[command]
        stages = (budget.of_trials if command in TRIALS else budget.of_queries)(command, config)
        output, told = Path(config.output), config.trainer
        devices = told.num_nodes * (told.devices if isinstance(told.devices, int) else 1)
    print(as_table(stages, devices))
    print(f"\nmeasured on one device, shared by {devices}; what the store holds is not made again; {room(output)}")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake is one line, not a traceback."""
    words = words_in_new_form(sys.argv[1:] if args is None else args)
    if words[:1] == ["budget"]:
        with mistakes_in_one_line(called_from_python=args is not None):
            run_budget(words[1:])
        return
    root = parser()
    config = root.parse_args(words)
    torch.set_float32_matmul_precision("high")
    initialised = root.instantiate(config)
    with mistakes_in_one_line(called_from_python=args is not None):
        runs: dict[str, Callable[[Any], Done | None]] = {
            "attribute": run_attribute,
            "compare": run_compare,
            "retrieval": run_retrieval,
            "counterfactual": run_counterfactual,
            "lds": run_lds,
            "report": run_report,
            "curate": run_curate,
            "calibrate": run_calibrate,
            "customized": run_customized,
        }
        command, settings = initialised.subcommand, initialised[initialised.subcommand]
        done = runs[command](settings)
        if done is not None and done.is_main:
            told = config[command].as_dict()
            track(
                settings.wandb,
                job=command,
                folder=Path(settings.output),
                config=told,
                store=done.store,
                results=done.results,
                images=done.images,
            )


if __name__ == "__main__":
    main()
