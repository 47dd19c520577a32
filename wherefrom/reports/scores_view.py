"""Scores that a person looks at: as a table, as a page in a notebook, as a chart, as a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wherefrom.data.image_set import ImageSet
from wherefrom.metrics.null_distribution import p_values
from wherefrom.queries.types import Scores, TrainingData
from wherefrom.rankings.ranking_file import order_of
from wherefrom.reports.attribution_report import write_report
from wherefrom.reports.html import Markup, shorten, tag
from wherefrom.reports.image_facts import image_facts
from wherefrom.reports.images import foreign, image_tag
from wherefrom.reports.query_section import ReportOptions, page_of, tie_notes
from wherefrom.runtime.optional_dependencies import require_pandas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIDE, _SHOWN, _CAPTION = 112, 10, 120  # CSS pixels, images, characters
# Styles stand in the elements: a notebook strips style sheets where it does not trust the page.
_ROW = "display:flex;flex-wrap:wrap;gap:10px;margin:0;padding:0;list-style:none"
_ITEM = f"width:{_SIDE}px;font-size:12px;line-height:1.3;overflow-wrap:anywhere"


@dataclass(frozen=True, repr=False)
class ScoresView(Scores):
    """One query's scores with the training images that they are of, as `attribute_images` returns them.

    Attributes:
        data: The training images and the images never trained on.
        notes: Warnings for reports, such as that this is a quick look.
        about: Name -> value for reports, such as method and model.
    """

    data: TrainingData = field(kw_only=True)
    notes: Sequence[str] = field(default=(), kw_only=True)
    about: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    @classmethod
    def of(
        cls, scores: Scores, data: TrainingData, *, notes: Sequence[str] = (), about: Mapping[str, str] | None = None
    ) -> ScoresView:
        """The same scores, beside the training images."""
        kept = {name: getattr(scores, name) for name in ("query", "ids", "scores", "null", "facts", "parts")}
        return cls(
            **kept,
            estimates=scores.estimates,
            per_copy=scores.per_copy,
            data=data,
            notes=tuple(notes),
            about=about or {},
        )

    @property
    def images(self) -> ImageSet:
        """The training images."""
        return self.data.images

    def table(self, count: int | None = None) -> Any:
        """The ranking as a pandas data frame, the most influential image first.

        Columns: `rank` (from 1), `image` (its id), `score`, `p_value` (where there are images never trained on),
        `estimate`, `low` and `high` (where a calibrated method gives them), `caption`, and each of the data set's own
        columns, such as `file_name`, `license` and `author`.

        Args:
            count: Only the first so many images; None is all.

        Raises:
            ImportError: pandas is not installed.
            ValueError: `count` is not at least 1, or a score is not finite.
        """
        pandas = require_pandas()
        order, rows = self._first(count)
        columns: dict[str, Any] = {
            "rank": np.arange(1, len(order) + 1),
            "image": [self.ids[position] for position in order],
            "score": self.scores[order],
        }
        if len(self.null):
            columns["p_value"] = p_values(self.comparable, self.null)[order]
        if self.estimates is not None:
            values = (self.estimates.values, self.estimates.low, self.estimates.high)
            columns |= {name: numbers[order] for name, numbers in zip(("estimate", "low", "high"), values, strict=True)}
        columns["caption"] = [self.images.captions[row][0] for row in rows]
        for name, column in self.images.columns.items():
            columns.setdefault(name, [column[row] for row in rows])
        return pandas.DataFrame(columns)

    def _first(self, count: int | None) -> tuple[Any, list[int]]:
        """Positions among the scores of the first images, and among the training images."""
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, or None for all images; given {count}.")
        order = order_of(self.ids, self.scores)[:count]
        where = {name: index for index, name in enumerate(self.images.ids)}
        return order, [where[self.ids[position]] for position in order]

    def _repr_html_(self) -> str:
        """The query and its first images, as notebooks show them."""
        return str(self._section(_SHOWN))

    def show(self, count: int = _SHOWN) -> None:
        """Shows the query and its first images in a notebook; elsewhere prints them as lines.

        Raises:
            ValueError: `count` is not at least 1.
        """
        section = self._section(count)
        try:
            from IPython import get_ipython  # type: ignore[import-not-found, unused-ignore]
            from IPython.display import HTML, display  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            notebook = False
        else:
            notebook = get_ipython() is not None
        if notebook:
            display(HTML(section))  # type: ignore[no-untyped-call, unused-ignore]
        else:
            print("\n".join(self.lines(count)))

    def lines(self, count: int = _SHOWN) -> list[str]:
        """The query and its first images as lines of text: rank, score, id, caption."""
        order, rows = self._first(count)
        said = f"  {self.query.prompt!r}" if self.query.prompt else "  (no prompt)"
        width = max((len(self.ids[position]) for position in order), default=0)
        lines = [f"{self.query.name}{said}", *tie_notes(self, count)]
        for rank, (position, row) in enumerate(zip(order, rows, strict=True), start=1):
            caption = " ".join(self.images.captions[row][0].split())
            lines.append(
                f"{rank:4d}  {self.scores[position]:+.6g}  {self.ids[position]:{min(width, 40)}}  "
                f"{shorten(caption, _CAPTION)}"
            )
        return lines

    def _section(self, count: int) -> Markup:
        """The query and its first images in a row, as HTML that needs no style sheet."""
        order, rows = self._first(count)
        query = self.query
        pixels = query.pixels if query.region is None else query.region.show(query.pixels)
        prompt = foreign(query.prompt, _CAPTION) if query.prompt.strip() else tag("i", "no prompt given")
        items = [tag("li", image_tag(pixels, _SIDE, "the query"), tag("div", prompt), tag("b", "query"), style=_ITEM)]
        licenses = self.images.columns.get("license", ("unknown",) * len(self.images))
        for rank, (position, row) in enumerate(zip(order, rows, strict=True), start=1):
            caption = self.images.captions[row][0]
            items.append(
                tag(
                    "li",
                    image_tag(np.asarray(self.images.pixels[row]), _SIDE, shorten(caption, _CAPTION)),
                    tag("div", tag("b", f"{rank}."), f" {self.scores[position]:+.4g}"),
                    tag("div", foreign(caption, _CAPTION)),
                    tag("div", foreign(licenses[row]), style="opacity:.7"),
                    style=_ITEM,
                )
            )
        notes = [tag("p", foreign(note, 2000)) for note in (*self.notes, *tie_notes(self, count))]
        return tag("div", *notes, tag("ol", *items, style=_ROW))

    def plot(self, count: int = 20) -> Figure:
        """The scores of the first images as bars, beside where images never trained on lie.

        Args:
            count: How many images.

        Returns:
            A matplotlib figure, which notebooks show; `figure.savefig(path)` keeps it.

        Raises:
            ValueError: `count` is not at least 1.
        """
        from matplotlib.figure import Figure  # without pyplot, which would keep every figure

        order, rows = self._first(count)
        figure = Figure(figsize=(7, 0.5 + 0.28 * len(order)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(order)), self.comparable[order], color="tab:blue", label="training images")
        names = [shorten(self.images.captions[row][0], 40).replace("$", r"\$") for row in rows]
        axes.set_yticks(range(len(order)), names, fontsize=8)
        axes.invert_yaxis()
        of_one = "" if self.per_copy is None else " of one copy"
        axes.set_xlabel(f"score{of_one} (higher is more influential)")
        axes.set_title(shorten(self.query.prompt or self.query.name, 60).replace("$", r"\$"), fontsize=10)
        if len(self.null):
            axes.axvline(
                float(self.null.max()), color="tab:red", linestyle="--", label="highest of images never trained on"
            )
            axes.legend(fontsize=8, loc="lower right")
        return figure

    def save_report(self, path: str | Path, options: ReportOptions = ReportOptions()) -> Path:
        """Writes the page of this query: its ranked images, warnings, and the shares of authors and licences.

        Args:
            path: The HTML file.
            options: What the page shows.

        Raises:
            StorageError: The file could not be written.
            ValueError: A group column is not in the data set.
        """
        return save_report(path, [self], options)


def save_report(path: str | Path, results: Sequence[ScoresView], options: ReportOptions = ReportOptions()) -> Path:
    """Writes one page of several queries' scores; see `ScoresView.save_report`."""
    if not results:
        raise ValueError("A report needs the scores of at least one query; there are none.")
    data = results[0].data
    write_report(
        Path(path),
        title=options.title,
        queries=[page_of(scores, scores.data, options) for scores in results],
        facts={
            **results[0].about,
            "Training images": f"{len(data.images):,}",
            **image_facts(data.images),
            **({} if data.held_out is None else {"Images never trained on (the null)": f"{len(data.held_out):,}"}),
        },
        notes=list(dict.fromkeys([*options.notes, *(note for scores in results for note in scores.notes)])),
    )
    return Path(path)
