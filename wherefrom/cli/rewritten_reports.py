"""Pages of run folders once more, from the scores that they keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from wherefrom.cli.run_file import RECORD, Request, read_request
from wherefrom.cli.run_inputs import inputs_of, report_options
from wherefrom.cli.run_sizes import framing_of, kept_size, size_of
from wherefrom.commands.attribute import kept_queries, kept_scores, rewrite_page
from wherefrom.commands.compare import COST, REPORT
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder
from wherefrom.data.image_set import ImageSet
from wherefrom.data.on_error import checked
from wherefrom.queries.types import Query, TrainingData
from wherefrom.reports.comparison_report import write_comparison_report
from wherefrom.runtime.artifacts import MANIFEST, Store
from wherefrom.runtime.checked_files import read_object
from wherefrom.runtime.measured_cost import Cost

_COUNTERFACTUAL = "counterfactual.json"


def rewrite(folder: Path, *, top: int | None, title: str | None, store: str) -> list[Path]:
    """Writes the pages of a run folder.

    Args:
        folder: A run folder of `attribute`, `compare` or the counterfactual evaluation.
        top: Training images of each query; None is as in the run.
        title: Title of the page; None is as in the run.
        store: Where the training images are kept.

    Raises:
        ValueError: The folder holds no finished run, or its training images are not there any more.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a run folder.")
    if (folder / _COUNTERFACTUAL).is_file():
        from wherefrom.counterfactual.report import write_counterfactual_report

        return list(write_counterfactual_report(folder))
    if not (folder / RECORD).is_file():
        raise ValueError(
            f"{folder} holds no {RECORD}: it is not a run of wherefrom attribute or compare. A run of evaluate.py "
            "writes its page when the same command is given again."
        )
    changes = {key: value for key, value in (("top", top), ("title", title)) if value is not None}
    request = Request(**{**read_request(folder / RECORD), **changes})
    if request.top < 1:
        raise ValueError(f"--top must be at least 1; given {request.top}.")
    below = [folder / Path(name).stem for name in request.method]  # where `compare` leaves each method's run
    single = len(below) == 1 and not below[0].is_dir()
    runs = [folder] if single else below
    missing = [run for run in runs if not (run / MANIFEST).is_file()]
    if missing:
        raise ValueError(f"{missing[0]} holds no finished run: give the run's command again, it goes on.")
    queries = [_with_region(query, request) for query in kept_queries(runs[0])]
    data = _training_images(request, folder, queries[0], store)
    options = report_options(request)
    results = {run.name: kept_scores(run, queries, data.images) for run in runs}
    pages = [rewrite_page(run, results[run.name], data, options) for run in runs]
    if single:
        return pages
    costs = {
        run.name: Cost(**read_object(run / COST, remedy="Delete it: only what earlier runs took is lost"))
        for run in runs
    }
    write_comparison_report(folder / REPORT, results, costs, data.images, options)
    return [folder / REPORT, *pages]


def _with_region(query: Query, request: Request) -> Query:
    """The query with the region that its name ends with."""
    height, width = query.pixels.shape[:2]
    for each in inputs_of(request)[1].regions:
        region = each.read((height, width))
        if query.id.endswith(f", {region.name}"):
            return replace(query, id=query.id.removesuffix(f", {region.name}"), region=region)
    return query


def _training_images(request: Request, run: Path, query: Query, store: str) -> TrainingData:
    """The images of the run's folder, from the store where they are there; at the size of the run."""
    folder = Path(request.images)
    if not folder.exists() and folder.is_absolute():
        raise ValueError(f"images: the run's folder {request.images!r} is not there any more.")
    height, width = (int(side) for side in query.pixels.shape[:2])
    size, framing = kept_size(run, request) or (size_of(request.size) or (height, width), framing_of(request))
    asked = inputs_of(request)[1]
    options = ImageFolderOptions.of_reading(
        asked.reading, size=size, on_error=checked(request.on_error), framing=framing
    )

    def read(place: Path) -> ImageSet:
        return build_image_folder(Store(store), place, options)

    ranked, null, _ = asked.choice.of(read(folder), read)
    return TrainingData(ranked, held_out=null)
