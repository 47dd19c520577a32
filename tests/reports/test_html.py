"""Text from outside stays text."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from wherefrom.reports.html import Markup, escape, shorten, tag


class _Reader(HTMLParser):
    """What a browser reads: elements with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "' onmouseover='alert(1)",
        "</bdi></p><style>*{display:none}</style>",
        "<!-- ",
        "]]>",
        "&lt;b&gt; &#60;b&#62; &amp",
        "javascript:alert(1)",
        "`${alert(1)}`",
    ],
)
def test_text_comes_back_as_text(hostile: str) -> None:
    read = _Reader(tag("p", hostile, title=hostile))
    assert read.elements == [("p", {"title": hostile})]
    assert read.text == hostile


def test_markup_is_kept_and_text_beside_it_escaped() -> None:
    assert tag("p", tag("b", "a<b"), " & c") == "<p><b>a&lt;b</b> &amp; c</p>"
    # Joining markup with text by hand gives text again: a slip shows on the page instead of opening a hole.
    assert tag("p", tag("b", "x") + "<i>") == "<p>&lt;b&gt;x&lt;/b&gt;&lt;i&gt;</p>"
    assert isinstance(tag("p"), Markup)


def test_attributes() -> None:
    assert tag("a", class_="x", aria_label="y", width=3, href=None) == '<a class="x" aria-label="y" width="3"></a>'
    assert tag("img", alt="") == '<img alt="">'


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x00b", "a⟦U+0000⟧b"),
        ("\u202egnp.exe\u202c", "⟦U+202E⟧gnp.exe⟦U+202C⟧"),
        ("\u2066a\u2069\u200f\u061c", "⟦U+2066⟧a⟦U+2069⟧⟦U+200F⟧⟦U+061C⟧"),
        ("zero\u200bwidth\ufeff", "zero⟦U+200B⟧width⟦U+FEFF⟧"),
        ("\x1b[31m\x85", "⟦U+001B⟧[31m⟦U+0085⟧"),
        ("half \ud83d of a pair", "half ⟦U+D83D⟧ of a pair"),
        ("one\r\n\ttwo\n\nthree", "one two three"),
        ("line\u2028separator", "line⟦U+2028⟧separator"),
        ("family \U0001f468\u200d\U0001f469, مرحبا, 東京, é", "family \U0001f468\u200d\U0001f469, مرحبا, 東京, é"),
    ],
)
def test_nothing_is_invisible(text: str, shown: str) -> None:
    assert escape(text) == shown
    assert escape(text).encode("utf-8")


def test_shorten() -> None:
    assert shorten("abc", 3) == "abc"
    assert shorten("a" * 1500, 10) == "aaaaaaaaaa… [1,490 more characters]"
