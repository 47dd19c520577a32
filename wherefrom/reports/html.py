"""HTML that text from outside cannot break out of.

Captions, ids, prompts and file names are not trusted. Markup is built by `tag`, which escapes every child that is not
markup already, so nobody can forget it; and characters that could hide or reorder text are written out as their code
points.
"""

from __future__ import annotations

import html
import re
import unicodedata
from pathlib import Path

from wherefrom.reports.stylesheet import STYLE
from wherefrom.runtime.artifacts import replacing

_VOID = frozenset({"img", "meta"})
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, format marks, unpaired surrogates, separators
_JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"  # scripts and emoji need them


class Markup(str):
    """HTML made by `tag`; any other string is text and gets escaped."""

    __slots__ = ()


def _visible(character: str) -> str:
    hidden = character not in _JOINERS and unicodedata.category(character) in _HIDDEN
    return f"⟦U+{ord(character):04X}⟧" if hidden else character


def escape(text: str) -> str:
    """Text as it may stand in an element or a quoted attribute: one line, nothing invisible, no HTML."""
    return html.escape("".join(map(_visible, re.sub(r"[ \t\r\n]+", " ", text))))


def shorten(text: str, most: int) -> str:
    """The first `most` characters, and how many more there are."""
    return text if len(text) <= most else f"{text[:most]}… [{len(text) - most:,} more characters]"


def tag(name: str, /, *children: str, **attributes: str | int | None) -> Markup:
    """An element; children that are not `Markup` are escaped, attributes always.

    Args:
        name: The element's name.
        children: What it contains.
        attributes: Values of None are left out; a trailing underscore (`class_`) is dropped, others become hyphens.
    """
    assert not (children and name in _VOID), f"<{name}> takes no children"
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    shown = "".join(f' {key}="{escape(str(value))}"' for key, value in given.items())
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    inner = "".join(child if isinstance(child, Markup) else escape(child) for child in children)
    return Markup(f"<{name}{shown}>{inner}</{name}>")


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


_TITLE = 100  # longest title, in characters


def write_page(path: Path, title: str, body: Markup, style: str = "") -> None:
    """Writes one self-contained page, whole or not at all.

    Args:
        path: The file.
        title: What the browser calls it.
        body: The `body` element.
        style: Style rules beside the report's own.

    Raises:
        StorageError: The file could not be written.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", shorten(title, _TITLE)),
        tag("style", Markup(STYLE + style)),
    )
    page = "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"
    with replacing(path) as temporary:
        temporary.write_bytes(page.encode("utf-8"))
