"""The report as a browser reads it: what it shows, and that nothing from a data set acts in it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from wherefrom.reports.attribution_report import QueryReport, RankedImage, Share, write_report
from wherefrom.reports.images import png_data_uri

# Those that neither run anything nor load anything; an image's source and a link's target are looked at besides.
ELEMENTS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "header",
    "nav",
    "main",
    "section",
    "footer",
    "h1",
    "h2",
    "h3",
}
ELEMENTS |= {"p", "a", "b", "i", "bdi", "div", "span", "img", "ul", "ol", "li", "dl", "dt", "dd"}
ELEMENTS |= {"table", "thead", "tbody", "tr", "th", "td"}
VOID = {"meta", "img"}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)' x='",
    "</title></style><svg onload=alert(1)>",
    "\u202egnp.exe\u202c\u2066",
    "a\x00b\nc\ud800",
    "w" * 100_000,
]


class Page(HTMLParser):
    """Elements with their attributes, and the text of each open element; refuses unbalanced markup."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_bytes().decode("utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and data.strip():
            self.texts.append(data.strip())

    def all(self, tag: str, class_: str | None = None) -> list[dict[str, str | None]]:
        return [
            result
            for name, result in self.elements
            if name == tag and (class_ is None or result.get("class") == class_)
        ]


def _pixels(seed: int, shape: tuple[int, int] = (8, 8)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def _image(rank: int = 1, score: float = 0.5, p_value: float | None = 0.007, **changes: str) -> RankedImage:
    image = RankedImage(
        f"style/{rank}",
        rank,
        score,
        p_value,
        _pixels(rank),
        f"caption {rank}",
        "CC-BY-4.0",
        {"author": "Ada", "license": "X"},
    )
    return replace(image, **changes)  # type: ignore[arg-type]


def _query(
    ranked: Sequence[RankedImage] = (_image(1), _image(2, -0.25)),
    prompt: str = "a fox",
    shares: Mapping[str, Sequence[Share]] | None = None,
) -> QueryReport:
    return QueryReport(
        "query-id", prompt, _pixels(99), ranked, shares or {}, {"reliability": "0.9"}, ["nothing stands out"]
    )


def _write(tmp_path: Path, *queries: QueryReport, title: str = "Title", methods_note: str = "How it was made.") -> Page:
    path = tmp_path / "report.html"
    write_report(
        path,
        title=title,
        queries=queries or [_query()],
        facts={"model": "tiny"},
        notes=["only a demonstration"],
        methods_note=methods_note,
    )
    return Page(path)


def _decode(address: str | None) -> NDArray[np.uint8]:
    assert address is not None
    kind, data = address.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (1, 1)])
def test_png_keeps_every_pixel(shape: tuple[int, int]) -> None:
    pixels = _pixels(0, shape)
    np.testing.assert_array_equal(_decode(png_data_uri(pixels)), pixels)
    np.testing.assert_array_equal(_decode(png_data_uri(pixels[:, ::-1])), pixels[:, ::-1])


def test_shows_everything(tmp_path: Path) -> None:
    page = _write(tmp_path)
    for text in (
        "Title",
        "a fox",
        "query-id",
        "nothing stands out",
        "only a demonstration",
        "How it was made.",
        "tiny",
    ):
        assert text in page.texts
    for text in ("caption 1", "style/1", "CC-BY-4.0", "p = 0.007", "+0.500", "−0.250", "Ada", "reliability", "0.9"):
        assert text in page.texts
    assert "X" not in page.texts  # the licence is shown once, not again among the groups
    for term in ("Rank", "Score", "p-value", "Shares", "Licence", "Not claimed"):
        assert term in page.texts


def test_images_are_the_right_ones(tmp_path: Path) -> None:
    page = _write(tmp_path)
    images = page.all("img")
    for image, seed, side in zip(images, (99, 1, 2), (256, 128, 128), strict=True):
        np.testing.assert_array_equal(_decode(image["src"]), _pixels(seed))
        assert (image["width"], image["height"], image["class"]) == (str(side), str(side), "pixels")
    assert [image["alt"] for image in images] == [
        "Generated image 1: a fox",
        "Training image style/1: caption 1",
        "Training image style/2: caption 2",
    ]
    assert ".pixels{image-rendering:pixelated}" in page.source


def test_large_images_are_reduced_in_proportion(tmp_path: Path) -> None:
    large = replace(_image(), pixels=_pixels(0, (300, 900)))
    image = _write(tmp_path, _query([large])).all("img")[1]
    assert _decode(image["src"]).shape == (85, 256, 3)
    assert (image["width"], image["height"], image.get("class")) == ("128", "43", None)


def test_nothing_from_outside_and_no_script(tmp_path: Path) -> None:
    page = _write(tmp_path, _query(), _query())
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert page.elements[2] == ("meta", {"charset": "utf-8"})
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert not re.search(r"https?:", page.source)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_is_inert_everywhere(tmp_path: Path, hostile: str) -> None:
    calm = _write(tmp_path, _query(shares={"group": [Share("name", 0.5, 0.4, 0.6, 0.5)]}), _query())
    image = RankedImage(hostile, 1, 0.5, None, _pixels(1), hostile, hostile, {hostile: hostile})
    shares = {hostile: [Share(hostile, 0.5, 0.4, 0.6, 0.5)]}
    query = QueryReport(hostile, hostile, _pixels(99), [image, image], shares, {hostile: hostile}, [hostile])
    path = tmp_path / "hostile.html"
    write_report(
        path, title=hostile, queries=[query, query], facts={hostile: hostile}, notes=[hostile], methods_note=hostile
    )
    page = Page(path)
    # The calm page's second query has no shares, so elements are compared as a set, then one by one for what could act.
    assert {name for name, _ in page.elements} == {name for name, _ in calm.elements} <= ELEMENTS
    for name, attributes in page.elements:
        known = {"class", "id", "style", "lang", "href", "src", "alt", "title", "width", "height", "scope"}
        assert set(attributes) <= known | {"aria-label", "aria-labelledby", "charset", "name", "content", "http-equiv"}
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
        assert re.fullmatch(r"#(legend|query-\d+)", attributes.get("href") or "#legend"), name
        assert re.fullmatch(r"((left|width):[0-9.]+%;?)*", attributes.get("style") or "")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page.source)
    assert len(page.source) < 100_000
    if hostile.startswith(("<", '"', "'")):
        shown = [text for text in page.texts if text == hostile]
        # Title twice; run fact (2), note, method; per query: prompt (and in the navigation), id, fact (2), note,
        # share column and name; per image: id, caption, licence, group (2).
        assert len(shown) == 2 + 2 + 1 + 1 + 2 * (2 + 1 + 2 + 1 + 2) + 4 * 5


def test_controls_are_written_out(tmp_path: Path) -> None:
    page = _write(tmp_path, _query([_image(caption="\u202egnp.exe\x00")]))
    assert "⟦U+202E⟧gnp.exe⟦U+0000⟧" in page.texts


def test_missing_texts_are_said(tmp_path: Path) -> None:
    page = _write(tmp_path, _query([_image(p_value=None, caption=" ", license="")], prompt=" \n"))
    for text in ("(no prompt given)", "no p-value", "(no caption)", "not stated"):
        assert text in page.texts
    assert page.all("img")[0]["alt"] == "Generated image 1"
    assert "No training image was ranked." in _write(tmp_path, _query([])).texts


def test_navigation_only_between_several(tmp_path: Path) -> None:
    assert _write(tmp_path, _query()).all("nav") == []
    page = _write(tmp_path, _query(), _query(prompt="a lemon"))
    targets = [link["href"] for link in page.all("a") if str(link["href"]).startswith("#query")]
    assert targets == ["#query-1", "#query-2"]
    assert [f"#{section['id']}" for section in page.all("section")] == targets
    assert page.texts.count("a lemon") == 2


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ([0.151, 0.0899, -0.0004], ["+0.151", "+0.090", "0.000"]),
        ([12.345, -1.0], ["+12.3", "−1.0"]),
        ([1234.4, 0.0], ["+1234", "0"]),
        ([1.2345e-5, -6e-7], ["+12.3 × 10⁻⁶", "−0.6 × 10⁻⁶"]),
        ([-3.21e7, 1e5], ["−32.1 × 10⁶", "+0.1 × 10⁶"]),
        ([1e308, 5e-324], ["+100 × 10³⁰⁶", "0 × 10³⁰⁶"]),
        ([0.0], ["0.00"]),
    ],
)
def test_scores(tmp_path: Path, scores: list[float], shown: list[str]) -> None:
    page = _write(tmp_path, _query([_image(rank, score) for rank, score in enumerate(scores, 1)]))
    texts = [text.replace("\u202f", " ") for text in page.texts]
    assert [text for text in texts if text in shown] == shown


@pytest.mark.parametrize(
    ("p", "shown"),
    [
        (1.0, "p = 1.00"),
        (0.5, "p = 0.50"),
        (0.0234, "p = 0.023"),
        (0.007, "p = 0.007"),
        (0.00042, "p = 0.0004"),
        (3.2e-5, "p = 3 × 10⁻⁵"),
        (0.0, "p = 0"),
    ],
)
def test_p_values(tmp_path: Path, p: float, shown: str) -> None:
    page = _write(tmp_path, _query([_image(p_value=p)]))
    assert shown in [text.replace("\u202f", " ") for text in page.texts]


def _bars(page: Page) -> list[str]:
    return [str(result["style"]) for result in page.all("span") if result.get("class") in {"fill", "whisker", "tick"}]


def test_share_bars(tmp_path: Path) -> None:
    shares = [Share("b", 0.6, 0.5, 0.75, 0.25), Share("a", 0.034, 0.0, 0.0999, None)]
    page = _write(tmp_path, _query(shares={"author": shares}))
    assert _bars(page) == [
        "width:60.00%",
        "left:50.00%;width:25.00%",
        "left:25.00%",
        "width:3.40%",
        "left:0.00%;width:9.99%",
    ]
    texts = [text.replace("\u202f", " ") for text in page.texts]
    start = texts.index("b")
    assert texts[start : start + 8] == ["b", "60 %", "50 % – 75 %", "25 %", "a", "3.4 %", "0 % – 10 %", "–"]


def test_small_shares_get_a_longer_scale_and_the_rest_is_summed(tmp_path: Path) -> None:
    shares = [Share(f"g{index}", 0.05, 0.025, 0.1, 0.05) for index in range(20)]
    page = _write(tmp_path, _query(shares={"author": shares}))
    assert _bars(page) == ["width:50.00%", "left:25.00%;width:75.00%", "left:50.00%"] * 10
    texts = [text.replace("\u202f", " ") for text in page.texts]
    assert "10 further groups hold 50 % together." in texts


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (_query([_image(1), _image(2, float("nan"))]), "'style/2'.*is nan"),
        (_query([_image(1, float("inf"))]), "'style/1'.*is inf"),
        (_query([_image(1, p_value=1.5)]), "p-value of training image 'style/1'.*is 1.5"),
        (_query([_image(1, p_value=float("nan"))]), "p-value of training image 'style/1'.*is nan"),
        (_query([replace(_image(), pixels=np.zeros((4, 4), np.uint8))]), "'style/1'.*uint8 RGB"),
        (_query([replace(_image(), pixels=np.zeros((4, 4, 3)))]), "'style/1'.*float64"),  # type: ignore[arg-type]
        (_query(shares={"author": [Share("a", float("nan"), 0.0, 1.0, None)]}), "author 'a'"),
        (_query(shares={"author": [Share("a", 0.5, 0.6, 0.5, None)]}), "author 'a'"),
        (_query(shares={"author": [Share("a", 0.5, 0.4, 0.6, 1.2)]}), "author 'a'"),
    ],
)
def test_refused_and_the_old_report_kept(tmp_path: Path, query: QueryReport, message: str) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match=message):
        write_report(path, title="Title", queries=[_query(), query], facts={})
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_needs_a_query(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one query"):
        write_report(tmp_path / "report.html", title="Title", queries=[], facts={})


def test_same_input_same_bytes_in_a_new_folder(tmp_path: Path) -> None:
    paths = [tmp_path / "new" / "one.html", tmp_path / "two.html"]
    for path in paths:
        write_report(path, title="Title", queries=[_query()], facts={})
    assert paths[0].read_bytes() == paths[1].read_bytes()
