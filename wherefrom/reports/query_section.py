"""Section of the attribution report on one query: its ranked images, measured facts, and warnings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from wherefrom.data.image_set import ImageSet
from wherefrom.data.repeats import REPEATS
from wherefrom.gradients.loss_excess import FAR_OUT
from wherefrom.metrics.group_shares import group_shares
from wherefrom.metrics.null_distribution import family_wise_p_value, p_values
from wherefrom.queries.types import Query, Scores, TrainingData
from wherefrom.rankings.ranking_file import flatness_of, order_of
from wherefrom.reports.attribution_report import QueryReport, RankedImage
from wherefrom.runtime.ranges import check_ranges

_NOTHING = 0.05  # family-wise p-value above which nothing stands out
_MOST_GROUPS = 50
_FLAT = 0.7  # of a uniform distribution it is 0.75, of a normal one 0.64
_PART = 10  # training images shown for each part of the scores


@dataclass(frozen=True)
class ReportOptions:
    """Options of the report pages.

    Attributes:
        top: Training images shown for each query, and counted in the shares of groups.
        groups: Columns of the data set whose shares are shown; None takes all with 2 to 50 values.
        title: Title of the page.
        notes: Warnings for the whole page, such as that the scores are a quick look.
    """

    top: int = 20
    groups: list[str] | None = None
    title: str = "Where did these images come from?"
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_ranges(top=self.top)

    def columns(self, images: ImageSet) -> list[str]:
        """The group columns.

        Raises:
            ValueError: A column is not in the data set.
        """
        if self.groups is None:
            skipped = {"split", "concept", "name", REPEATS}
            most = min(_MOST_GROUPS, len(images) - 1)  # a column that tells every image apart groups nothing
            return [
                name for name, values in images.columns.items() if name not in skipped and 2 <= len(set(values)) <= most
            ]
        missing = [name for name in self.groups if name not in images.columns]
        if missing:
            raise ValueError(f"The data set has no column {missing[0]!r}; it has {', '.join(images.columns)}.")
        return self.groups


def page_of(scores: Scores, data: TrainingData, options: ReportOptions) -> QueryReport:
    """The query's section, from its scores.

    Args:
        scores: The query's scores.
        data: The training images.
        options: What is shown.

    Raises:
        ValueError: A group column is not in the data set.
    """
    images, columns = data.images, options.columns(data.images)
    where = {name: index for index, name in enumerate(images.ids)}
    tail = p_values(scores.comparable, scores.null) if len(scores.null) else None

    def influence(position: int) -> tuple[float, float, float] | None:
        if scores.estimates is None:
            return None
        each = scores.estimates
        return float(each.values[position]), float(each.low[position]), float(each.high[position])

    def ranked(
        values: Float[NDArray[np.float64], " n"], count: int, chances: Float[NDArray[np.float64], " n"] | None = None
    ) -> list[RankedImage]:
        result = []
        for rank, position in enumerate(order_of(scores.ids, values)[:count], start=1):
            index = where[scores.ids[position]]
            result.append(
                RankedImage(
                    id=images.ids[index],
                    rank=rank,
                    score=float(values[position]),
                    p_value=None if chances is None else float(chances[position]),
                    pixels=np.asarray(images.pixels[index]),
                    caption=images.captions[index][0],
                    license=images.columns.get("license", ("unknown",) * len(images))[index],
                    groups={column: images.columns[column][index] for column in columns},
                    influence=influence(int(position)),
                    repeats=None if images.weights is None else int(images.weights[index]),
                )
            )
        return result

    facts, notes = _facts(scores)
    notes += [*tie_notes(scores, options.top), *sign_notes(scores, options.top)]
    shares = {}
    if scores.all_equal:
        pass
    elif scores.scores.max() > np.median(scores.scores):
        positions = [where[name] for name in scores.ids]
        top = min(options.top, len(positions))
        shares = {
            column: group_shares(scores.scores, groups=[images.columns[column][p] for p in positions], top=top)
            for column in columns
        }
    else:
        notes.append("No image scores above the median: there is no influence to divide between groups.")
    query = scores.query
    pixels = query.pixels if query.region is None else query.region.show(query.pixels)
    first = ranked(scores.scores, options.top, tail)
    parts = {name: ranked(values, min(_PART, options.top)) for name, values in scores.parts.items()}
    stated = {} if query.metadata is None else query.metadata.table()
    return QueryReport(query.name, query.prompt, pixels, first, shares, facts, notes, parts, stated)


def tie_notes(scores: Scores, shown: int) -> list[str]:
    """What must be said of scores that are equal: that there is no order, or that it ends in a tie.

    Args:
        scores: The scores.
        shown: How many of the first images are shown.
    """
    if scores.all_equal:
        return [
            "All scores are equal: for this image the method does not tell the training images apart. They are listed "
            "by their names, and their order says nothing."
        ]
    ordered = np.sort(scores.scores)[::-1]
    last = ordered[min(shown, len(ordered)) - 1]
    tied, before = int((ordered == last).sum()), int((ordered > last).sum())
    if before + tied <= shown:
        return []
    return [
        f"From place {before + 1} on, {tied:,} training images have the same score: which of them are shown, and in "
        "what order, is decided by their names."
    ]


def sign_notes(scores: Scores, shown: int) -> list[str]:
    """What must be said where the first images have negative scores.

    Args:
        scores: The scores.
        shown: How many of the first images are shown.
    """
    if scores.all_equal:
        return []
    positive = int((scores.scores > 0).sum())
    if positive >= min(shown, len(scores.scores)):
        return []
    from_where = f"From place {positive + 1} on, scores are" if positive else "No score is above 0: all are"
    return [
        f"{from_where} 0 or less. Where a method measures losses or gradients, 0 is no effect and less is an influence "
        "against this image; where it measures similarity, 0 is no likeness. They are shown because none has more."
    ]


def metadata_notes(query: Query) -> list[str]:
    """Warnings of what the image file says: where the prompt is from, what differs, what is not interpreted."""
    metadata = query.metadata
    if metadata is None:
        return []
    notes = [f"{note[:1].upper()}{note[1:]}." for note in metadata.notes]
    if query.own_prompt:
        return [f"No prompt was given: the image's own is used, from its {metadata.source}.", *notes]
    if metadata.prompt is not None and " ".join(metadata.prompt.split()) != " ".join(query.prompt.split()):
        return ["The prompt is another than the one that the image file states.", *notes]
    return notes


def _facts(scores: Scores) -> tuple[dict[str, str], list[str]]:
    facts, notes = {}, []
    if scores.query.region is not None:
        facts["Region"] = f"{scores.query.region.name}; the rest is shown faded"
    reliability = scores.facts.get("split_half_reliability")
    if reliability is not None and math.isfinite(reliability):
        facts["Split-half reliability"] = f"{reliability:.3f}"
        if reliability < 0.8:
            notes.append(
                f"The ranking is noisy: its split-half reliability is {reliability:.2f}. Measure more timesteps "
                "or noise samples."
            )
    for name, label in (
        ("query_loss_rise", "Relative loss increase"),
        ("query_square_output_rise", "Relative increase of the squared output"),
    ):
        if name in scores.facts:
            facts[label] = f"{scores.facts[name]:.1%}"
    for name, label in (("unlearning_s", "Unlearning"), ("losses_s", "Training losses")):
        if name in scores.facts:
            facts[label] = f"{scores.facts[name]:.1f} s"
    for count in (1, 10, 100):
        if math.isfinite(scores.facts.get(f"influence_of_first_{count}", math.nan)):
            facts[f"Influence of the first {count}"] = (
                f"{scores.facts[f'influence_of_first_{count}']:.0%} of all, estimated"
            )
    if "effective_pictures" in scores.facts:
        facts["Effective number of images"] = f"{scores.facts['effective_pictures']:.1f}, estimated"
    flatness = flatness_of(scores.scores)
    if flatness > _FLAT and not scores.all_equal:
        notes.append(
            "The scores are nearly uniform: the influence above the median is spread over "
            f"{flatness:.0%} of the images that have any. The order tells little."
        )
    if scores.facts.get("loss_excess", 0.0) > FAR_OUT:
        notes.append(
            "The model cannot represent this image well: with this prompt its loss lies "
            f"{scores.facts['loss_excess']:.1f} interquartile ranges above the upper quartile of training images' "
            "losses. It may not have drawn it."
        )
    notes += metadata_notes(scores.query)
    if not scores.query.prompt:
        notes.append(
            "The prompt is not known: the empty prompt was used, so what only the words brought in cannot be found."
        )
    if len(scores.null) >= 10:
        family = family_wise_p_value(scores.comparable, scores.null)
        facts["Family-wise p of the first"] = f"{family:.2g}"
        if family > _NOTHING:
            notes.append(
                "Nothing stands out: no training image scores higher than images never trained on would by chance."
            )
    return facts, notes
