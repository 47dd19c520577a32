"""The short way in: a model, a folder of captioned images, and the images that are asked about."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from wherefrom.attributors import AttributionByUnlearning
from wherefrom.attributors.base import Attributor
from wherefrom.commands import compare as comparison
from wherefrom.commands.packaged_methods import DEFAULT_METHOD, QUICK_NOTE, load_packaged
from wherefrom.commands.prepared_run import (
    AttributionOptions,
    PreparedRun,
    QueryInput,
    image_size,
    open_model,
    prepare_run,
)
from wherefrom.data.image_set import ImageSet
from wherefrom.queries.sources import QueryRegion
from wherefrom.reports.query_section import ReportOptions
from wherefrom.reports.scores_view import ScoresView, save_report
from wherefrom.runtime.cli_errors import option_names, spoken_words
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner, parse_device

__all__ = ["AttributedImages", "AttributionOptions", "attribute_images", "compare", "image_size", "open_model"]

Method = str | Path | Attributor
# What the library calls an option -> how it is given here.
WORDS: Mapping[str, str] = {
    "queries.resize: true": "AttributionOptions(resize=True)",
    "queries.regions": "AttributionOptions.regions",
    "the option 'base'": "AttributionOptions.base",
    "the option 'caption'": "AttributionOptions.caption",
    # Columns are not chosen here: what is in the way is changed in the metadata.
    "Name the columns to keep in the option 'columns'.": "Write it as text, or take the column out of the metadata.",
    ", or leave it out of the option 'columns'": ", or rename the column",
    "Take it out of the option 'columns'.": "Rename the column, or take it out of the metadata.",
    "the option 'layout'": "AttributionOptions.layout",
    "layout: sidecar": "AttributionOptions(layout='sidecar')",
    "the option 'one_caption'": "AttributionOptions.one_caption",
    "the option 'image_column'": "AttributionOptions.image_column",
    "the options 'image_column' and 'caption'": "AttributionOptions.image_column and caption",
    "the option 'trigger'": "AttributionOptions.trigger",
    "caption_lines: first or whole": "AttributionOptions.caption_lines",
    "null: none, split: all": "AttributionOptions(null='none', split='all')",
    "null: none": "AttributionOptions(null='none')",
    "split: all": "AttributionOptions(split='all')",
    "in split:": "in AttributionOptions.split",
    "the option 'size'": "AttributionOptions.size",
    "on_error: skip": "AttributionOptions(on_error='skip')",
    "buckets.upscale: true": "upscale=True in its buckets",
    "set buckets": "give AttributionOptions(framing=Framing(buckets=Buckets()))",
    "the option 'lora'": "AttributionOptions.lora",
    "lora:": "AttributionOptions.lora:",
    "see wherefrom methods": "see wherefrom.commands.method_files.available_methods()",
    "--query": "queries",
    "Ask for a smaller relative_loss_increase, or give alpha instead": "Give AttributionOptions(settings="
    "{'unlearning.relative_loss_increase': 0.2}), or less",
}


class AttributedImages(Sequence[ScoresView]):
    """The scores of each query, computed when they are first asked for, and kept.

    Iterating yields each query's scores as they are ready; an index waits for those before it. A notebook shows the
    queries with their ranked images.
    """

    def __init__(
        self, run: PreparedRun, method: Attributor, *, notes: Sequence[str] = (), about: Mapping[str, str] | None = None
    ) -> None:
        self.method, self.data, self._notes, self._about = method, run.data, notes, about or {}
        self._run, self._kept = run, list[ScoresView]()
        self._coming: Iterator[ScoresView] | None = None

    def __len__(self) -> int:
        return len(self._run.queries)

    def _scores(self) -> Iterator[ScoresView]:
        """Fits the method and scores one query after the other."""
        run = self._run
        with option_names(WORDS):
            self.method.progress = run.console.progress
            self.method.fit(run.data, run.model, run.store, run.runner, run.console.log)
            for scores in self.method.score(run.queries):
                run.console.log(f"query {len(self._kept) + 1} of {len(self)} is done: {scores.query.prompt!r}")
                yield ScoresView.of(scores, run.data, notes=self._notes, about=self._about)

    def _until(self, count: int) -> None:
        """Makes the first so many."""
        if self._coming is None:
            self._coming = self._scores()
        while len(self._kept) < count:
            try:
                self._kept.append(next(self._coming))
            except BaseException:
                self._coming = None if not self._kept else self._coming
                raise

    def __iter__(self) -> Iterator[ScoresView]:
        for index in range(len(self)):
            self._until(index + 1)
            yield self._kept[index]

    @overload
    def __getitem__(self, index: int) -> ScoresView: ...

    @overload
    def __getitem__(self, index: slice) -> list[ScoresView]: ...

    def __getitem__(self, index: int | slice) -> ScoresView | list[ScoresView]:
        """The scores of one query, or of several."""
        places = range(len(self))[index]
        self._until(max([*places, -1] if isinstance(places, range) else [places]) + 1)
        return [self._kept[place] for place in places] if isinstance(places, range) else self._kept[places]

    def __repr__(self) -> str:
        return f"<scores of {len(self)} queries by {type(self.method).__name__}, {len(self._kept)} of them computed>"

    def _repr_html_(self) -> str:
        """Every query with its first images, as notebooks show them; computes what is missing."""
        return "".join(scores._repr_html_() for scores in self)

    def table(self, count: int | None = None) -> Any:
        """The rankings of all queries as one pandas data frame; see `ScoresView.table`.

        Raises:
            ImportError: pandas is not installed.
        """
        from wherefrom.runtime.optional_dependencies import require_pandas

        pandas = require_pandas()
        tables = [scores.table(count).assign(query=scores.query.name, prompt=scores.query.prompt) for scores in self]
        joined = pandas.concat(tables, ignore_index=True)
        first = ["query", "prompt"]
        return joined[first + [name for name in joined.columns if name not in first]]

    def save_report(self, path: str | Path, options: ReportOptions = ReportOptions()) -> Path:
        """Writes one page of all queries; see `ScoresView.save_report`."""
        return save_report(path, list(self), options)


def attribute_images(
    model: Any,
    images: str | Path | ImageSet,
    queries: Sequence[QueryInput],
    method: Method = DEFAULT_METHOD,
    options: AttributionOptions = AttributionOptions(),
) -> AttributedImages:
    """Scores every training image for each query: which of them made it what it is?

    Everything is checked, the model loaded and the images encoded when this is called; scores are computed when they
    are asked for, one query at a time.

    Args:
        model: A loaded diffusers text-to-image pipeline, its folder or hub id, or a `DiffusionModel`.
        images: The training images: a folder (or a file that names them) in any layout that is known, or an `ImageSet`.
            All are ranked, unless they have splits: then `train` is, and images of their own split `validation`, which
            the model was never trained on, are the null of the p-values. `AttributionOptions.split` and `null` choose
            others; without a null there are no p-values.
        queries: (image, prompt) pairs, the image a file, a PIL image or a uint8 array (H, W, 3), and the prompt `""`
            where it is not known; or prompts alone, whose images are drawn from the model.
        method: A packaged method's name, a YAML file, or an attributor.
        options: How; see `AttributionOptions`.

    Raises:
        ValueError: The model, the images, a query, the method or a setting cannot be used; the message says why.
        OSError: There is no pipeline at that path.
    """
    with option_names(WORDS), spoken_words(WORDS):
        given, name = _attributor(method, options)
        runner = Runner.current(parse_device(options.device))
        run = prepare_run(model, images=images, queries=queries, methods=[given], options=options, runner=runner)
        given.check(run.queries)
    about = {"Method": name, "Model": run.model.description()}
    notes = [*([QUICK_NOTE] if options.quick else []), *run.model.notes]
    return AttributedImages(run, given, notes=notes, about=about)


def _attributor(method: Method, options: AttributionOptions) -> tuple[Attributor, str]:
    """The method, and what it is called."""
    if isinstance(method, Attributor):
        if options.settings or options.quick:
            raise ValueError(
                "AttributionOptions: settings and quick change a method that is named; an attributor that is given "
                "has its settings already."
            )
        return method, type(method).__name__
    ((name, made),) = load_packaged([str(method)], options.settings, options.quick).items()
    return made, name


def compare(
    model: Any,
    *,
    images: str | Path | ImageSet,
    queries: Sequence[QueryInput],
    methods: Sequence[str | Path],
    output: str | Path,
    options: AttributionOptions = AttributionOptions(),
    report: ReportOptions = ReportOptions(),
) -> dict[str, list[ScoresView]]:
    """Runs several methods on the same queries: their rankings, what each costs, and how far they agree.

    Args:
        model: See `attribute_images`.
        images: See `attribute_images`.
        queries: See `attribute_images`.
        methods: Packaged methods' names, or YAML files.
        output: The run folder: `report.html`, `methods.parquet`, `correlations.parquet` and a folder for each method.
        options: How; see `AttributionOptions`.
        report: What the pages show.

    Returns:
        Method -> scores of each query.

    Raises:
        ValueError: See `attribute_images`; or the folder holds a run with other settings.
        OSError: There is no pipeline at that path, or the folder could not be written.
    """
    with option_names(WORDS), spoken_words(WORDS):
        named = load_packaged([str(method) for method in methods], options.settings, options.quick)
        runner = Runner.current(parse_device(options.device))
        run = prepare_run(model, images=images, queries=queries, methods=named.values(), options=options, runner=runner)
        for each in named.values():
            each.progress = run.console.progress
        results = comparison.compare(
            Path(output),
            methods=named,
            data=run.data,
            model=run.model,
            queries=run.queries,
            store=run.store,
            runner=run.runner,
            options=report,
            log=run.console.log,
        )
    notes = run.model.notes
    return {
        name: [ScoresView.of(scores, run.data, notes=notes) for scores in result] for name, result in results.items()
    }


def attribute_pictures(
    pipeline: Any,
    folder: str | Path,
    pictures: list[tuple[str, str]],
    attributor: Attributor | None = None,
    *,
    store: str | Path = "cache",
    resize: bool = False,
    regions: Sequence[QueryRegion] = (),
    say: Log = no_log,
) -> Iterator[ScoresView]:
    """The name of `attribute_images` before version 0.2, with its default method; goes with the next release."""
    warnings.warn(
        "attribute_pictures is now attribute_images(model, images, queries), whose default is AbU+.",
        DeprecationWarning,
        stacklevel=2,
    )
    say("attribute_pictures is now attribute_images")
    method = AttributionByUnlearning() if attributor is None else attributor
    options = AttributionOptions(store=store, resize=resize, regions=regions, progress=False)
    return iter(attribute_images(pipeline, folder, pictures, method, options))
