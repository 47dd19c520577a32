"""A self-contained HTML page: one file whose own policy forbids scripts and anything from outside."""

from __future__ import annotations

from pathlib import Path

from wherefrom.markup import Markup, shorten, tag
from wherefrom.report_style import STYLE
from wherefrom.storage import replacing

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
