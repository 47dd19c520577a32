"""One self-contained HTML page that shows which training images made each generated image.

Ids, captions, prompts, groups and licences come from data sets and are not trusted: all markup is built by
`html.tag`, which escapes text, and the page's own policy forbids scripts and anything from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from wherefrom.metrics.group_shares import Share
from wherefrom.reports.html import Markup, shorten, tag, write_page
from wherefrom.reports.images import LABEL, Pixels, check_pixels, foreign, image_tag, thumbnail_row
from wherefrom.reports.legend import LEGEND, OF_A_NULL, REPEATS_LEGEND

__all__ = ["QueryReport", "RankedImage", "Share", "write_report"]

_CARD, _QUERY, _SMALL = 128, 256, 48  # sides in CSS pixels
_CAPTION, _PROMPT = 400, 2000  # longest text shown, in characters
_MOST_GROUPS = 10
_AXES = (0.05, 0.1, 0.25, 0.5)  # where the bars may end, if not at 1
_THIN = "\N{NARROW NO-BREAK SPACE}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class RankedImage:
    """A training image and its place in the ranking of one query.

    Attributes:
        id: The image's id.
        rank: From 1, the most influential.
        score: Higher = more influential.
        p_value: Share of images never trained on that score as high, if measured.
        pixels: The image.
        caption: Its caption.
        license: Its licence, as its data set states it.
        groups: Column -> value, such as author and style.
        influence: Estimated influence and the ends of its interval, from a calibrated method.
        repeats: How often an epoch of training saw the image, where that differs between images.
    """

    id: str
    rank: int
    score: float
    p_value: float | None
    pixels: Pixels
    caption: str
    license: str
    groups: Mapping[str, str]
    influence: tuple[float, float, float] | None = None
    repeats: int | None = None


@dataclass(frozen=True)
class QueryReport:
    """One generated image on the page, with its ranked training images.

    Attributes:
        id: The query's id.
        prompt: Its prompt; empty if it is not known.
        pixels: The generated image.
        ranked: Training images, the most influential first.
        shares: Group column -> shares of its groups, the largest first.
        facts: Name -> value, such as the split-half reliability.
        notes: Warnings, such as that nothing stands out from images never trained on.
        parts: Part of the scores (a band of timesteps, a caption) -> training images, the most influential first.
        stated: Name -> value of what the image file says of how it was made; untrusted, and only shown.
    """

    id: str
    prompt: str
    pixels: Pixels
    ranked: Sequence[RankedImage]
    shares: Mapping[str, Sequence[Share]]
    facts: Mapping[str, str]
    notes: Sequence[str]
    parts: Mapping[str, Sequence[RankedImage]] = field(default_factory=dict)
    stated: Mapping[str, str] = field(default_factory=dict)


def _check(query: QueryReport) -> None:
    check_pixels(f"query {query.id!r}", query.pixels)
    for image in (*query.ranked, *(each for part in query.parts.values() for each in part)):
        name = f"training image {image.id!r} (query {query.id!r}, rank {image.rank})"
        check_pixels(name, image.pixels)
        if not math.isfinite(image.score):
            raise ValueError(
                f"The score of {name} is {image.score}; a report of it would be meaningless. Attribute again."
            )
        if image.p_value is not None and not 0 <= image.p_value <= 1:
            raise ValueError(f"The p-value of {name} is {image.p_value}; it must lie between 0 and 1, or be None.")
    for column, shares in query.shares.items():
        for each in shares:
            numbers = (each.share, each.low, each.high, 0.0 if each.expected is None else each.expected)
            if not all(0 <= number <= 1 for number in numbers) or each.low > each.high:
                raise ValueError(
                    f"Query {query.id!r}: {column} {each.name!r} has shares outside 0 to 1, or low above high: {each}."
                )


def _power(exponent: int) -> str:
    return f"{_THIN}×{_THIN}10{str(exponent).translate(_SUPERSCRIPT)}"


def _score_format(scores: Iterable[float]) -> Callable[[float], str]:
    """Writes the scores of one query in one unit and with equally many decimals; the largest has three digits."""
    largest = max((abs(Decimal(float(score))) for score in scores), default=Decimal(0))
    magnitude = largest.adjusted() if largest else 0
    exponent = 0 if -3 <= magnitude < 5 else 3 * (magnitude // 3)
    decimals = max(0, 2 - (magnitude - exponent))

    def write(score: float) -> str:
        scaled = round(Decimal(float(score)).scaleb(-exponent), decimals)
        sign = "+" if scaled > 0 else "\N{MINUS SIGN}" if scaled < 0 else ""
        return f"{sign}{abs(scaled):.{decimals}f}" + (_power(exponent) if exponent else "")

    return write


def _p_value(p: float | None) -> str:
    if p is None:
        return "no p-value"
    if 0 < p < 1e-4:
        digit, exponent = f"{p:.0e}".split("e")
        return f"p = {digit}{_power(int(exponent))}"
    return "p = 0" if p == 0 else f"p = {p:.{2 if p >= 0.1 else 3 if p >= 1e-3 else 4}f}"


def _influence(result: tuple[float, float, float] | None) -> Markup:
    if result is None:
        return Markup()
    write = _score_format(number for number in result if math.isfinite(number))
    value, low, high = (write(number) if math.isfinite(number) else "−∞" if number < 0 else "∞" for number in result)
    return tag("p", f"influence {value} ({low} to {high})", class_="p")


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if 0 < share < 0.0995 else 0}f}{_THIN}%"


def _table(facts: Mapping[str, str], class_: str) -> Markup:
    rows = [tag("div", tag("dt", foreign(name)), tag("dd", foreign(value, _CAPTION))) for name, value in facts.items()]
    return tag("dl", *rows, class_=class_) if rows else Markup()


def _warnings(notes: Sequence[str]) -> Markup:
    return tag("ul", *[tag("li", foreign(note, _PROMPT)) for note in notes], class_="notes") if notes else Markup()


def _card(image: RankedImage, score: str) -> Markup:
    caption = image.caption.strip()
    alt = f"Training image {shorten(image.id, LABEL)}: {shorten(caption, LABEL)}"
    groups = [
        tag("span", tag("i", foreign(column)), " ", foreign(value), class_="group")
        for column, value in image.groups.items()
        if column != "license"
    ]
    return tag(
        "li",
        tag("div", image_tag(image.pixels, _CARD, alt), class_="frame"),
        tag("p", tag("b", str(image.rank), class_="rank"), tag("span", score, class_="score"), class_="numbers"),
        tag("p", _p_value(image.p_value), class_="p"),
        _influence(image.influence),
        Markup() if image.repeats is None else tag("p", f"repeats {image.repeats}", class_="p"),
        tag(
            "p",
            foreign(caption, _CAPTION) if caption else "(no caption)",
            class_="caption",
            title=shorten(caption, _CAPTION),
        ),
        tag("p", foreign(image.id), class_="id"),
        tag("p", *groups, class_="groups") if groups else Markup(),
        tag(
            "p",
            tag("i", "licence"),
            " ",
            foreign(image.license) if image.license.strip() else "not stated",
            class_="license",
        ),
    )


def _bar(each: Share, end: float) -> Markup:
    def at(share: float) -> str:
        return f"{100 * share / end:.2f}%"

    tick = Markup() if each.expected is None else tag("span", class_="tick", style=f"left:{at(each.expected)}")
    return tag(
        "div",
        tag("span", class_="fill", style=f"width:{at(each.share)}"),
        tag("span", class_="whisker", style=f"left:{at(each.low)};width:{at(each.high - each.low)}"),
        tick,
        class_="bar",
    )


def _share_table(column: str, shares: Sequence[Share]) -> Markup:
    shown, rest = shares[:_MOST_GROUPS], shares[_MOST_GROUPS:]
    reach = max((number for each in shown for number in (each.share, each.high, each.expected or 0.0)), default=1.0)
    end = next((axis for axis in _AXES if reach <= axis), 1.0)
    rows = [
        tag(
            "tr",
            tag("th", foreign(each.name), scope="row"),
            tag("td", _bar(each, end), class_="drawn"),
            tag("td", _percent(each.share)),
            tag("td", f"{_percent(each.low)} – {_percent(each.high)}"),
            tag("td", "–" if each.expected is None else _percent(each.expected)),
        )
        for each in shown
    ]
    axis = tag("span", "0", tag("span", _percent(end)), class_="axis")
    titles = [
        tag("th", foreign(column)),
        tag("th", axis),
        *(tag("th", title) for title in ("share", "interval", "in training")),
    ]
    more = f"{len(rest)} further groups hold {_percent(min(1.0, sum(each.share for each in rest)))} together."
    return tag(
        "div",
        tag("table", tag("thead", tag("tr", *titles)), tag("tbody", *rows), class_="shares"),
        tag("p", more, class_="quiet") if rest else Markup(),
        class_="scroll",
    )


def prompt_tag(prompt: str) -> Markup:
    """A prompt, or that there is none."""
    return foreign(prompt, _PROMPT) if prompt.strip() else tag("span", "(no prompt given)", class_="quiet")


def _stated(stated: Mapping[str, str]) -> list[Markup]:
    """What the file says of itself, beside what is made of it."""
    if not stated:
        return []
    words = (
        "Stated by the file, not checked. Only the prompt counts for the scores, and only where none was given: the "
        "model learned from captions alone, so the loss knows no negative prompt, guidance, sampler or seed."
    )
    table = _table(stated, "facts")
    return [tag("details", tag("summary", "What the image says of itself"), table, tag("p", words, class_="quiet"))]


def _query(number: int, query: QueryReport) -> Markup:
    alt = (
        f"Generated image {number}: {shorten(query.prompt, LABEL)}"
        if query.prompt.strip()
        else f"Generated image {number}"
    )
    write = _score_format(image.score for image in query.ranked)
    cards = [_card(image, write(image.score)) for image in query.ranked]
    shares = [_share_table(column, each) for column, each in query.shares.items() if each]
    return tag(
        "section",
        tag(
            "div",
            tag("div", image_tag(query.pixels, _QUERY, alt), class_="frame"),
            tag("p", f"Generated image {number}", class_="kicker"),
            tag("h2", prompt_tag(query.prompt), id=f"prompt-{number}"),
            tag("p", foreign(query.id), class_="id"),
            _table(query.facts, "facts"),
            *_stated(query.stated),
            class_="query",
        ),
        tag(
            "div",
            _warnings(query.notes),
            tag("h3", "Most influential training images"),
            tag("ol", *cards, class_="cards") if cards else tag("p", "No training image was ranked.", class_="quiet"),
            *([tag("h3", "By part of the score"), *_parts(query)] if query.parts else []),
            *([tag("h3", "Influence by group"), tag("div", *shares, class_="columns")] if shares else []),
        ),
        id=f"query-{number}",
        aria_labelledby=f"prompt-{number}",
    )


def _parts(query: QueryReport) -> list[Markup]:
    rows = []
    for name, ranked in query.parts.items():
        words = [f"{each.rank}. {shorten(each.caption, LABEL)} ({shorten(each.id, LABEL)})" for each in ranked]
        images = zip((each.pixels for each in ranked), words, strict=True)
        rows.append(thumbnail_row(tag("b", foreign(name)), images))
    return rows


def _navigation(queries: Sequence[QueryReport]) -> Markup:
    if len(queries) < 2:
        return Markup()
    links = [
        tag(
            "li",
            tag(
                "a",
                image_tag(query.pixels, _SMALL, ""),
                tag("span", prompt_tag(query.prompt)),
                href=f"#query-{number}",
            ),
        )
        for number, query in enumerate(queries, 1)
    ]
    return tag("nav", tag("ol", *links), aria_label="Generated images")


def write_report(
    path: Path,
    *,
    title: str,
    queries: Sequence[QueryReport],
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
    methods_note: str = "",
) -> None:
    """Writes the page as one file, whole or not at all; the same arguments give the same bytes.

    Args:
        path: The file, such as `report.html`.
        title: Heading of the page.
        queries: The generated images, in the order of the page.
        facts: Name -> value for the whole run, such as model, method and training set.
        notes: Warnings for the whole run.
        methods_note: How the scores were made, in a sentence or two.

    Raises:
        ValueError: There is no query, or a query holds a score that is not finite, a p-value or a share outside 0 to 1,
            or pixels that are not uint8 RGB; the image is named and nothing is written.
        StorageError: The file could not be written.
    """
    if not queries:
        raise ValueError("A report needs at least one query; none was given.")
    for query in queries:
        _check(query)
    lead = "Beside each generated image: the training images that influenced it most, in order. "
    null = any(image.p_value is not None for query in queries for image in query.ranked)
    repeated = any(image.repeats is not None for query in queries for image in query.ranked)
    words = {**LEGEND, **(REPEATS_LEGEND if repeated else {})}
    legend = [
        tag("div", tag("dt", name), tag("dd", meaning))
        for name, meaning in words.items()
        if null or name not in OF_A_NULL
    ]
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", foreign(title, _CAPTION)),
            tag("p", lead, tag("a", "How to read this page", href="#legend"), class_="lead"),
            _warnings(notes),
            _table(facts, "facts wide"),
        ),
        _navigation(queries),
        tag("main", *[_query(number, query) for number, query in enumerate(queries, 1)]),
        tag(
            "footer",
            tag("h2", "How to read this page"),
            tag("p", foreign(methods_note, _PROMPT)) if methods_note else Markup(),
            tag("dl", *legend),
            id="legend",
        ),
    )
    write_page(path, title, body)
