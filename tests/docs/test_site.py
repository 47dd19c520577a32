"""The documentation site: it builds without a warning, needs no network, and has no dead link."""

from __future__ import annotations

import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
# Attributes of what a page loads by itself; links that a reader follows may lead anywhere.
LOADED = {("script", "src"), ("img", "src"), ("source", "src"), ("iframe", "src"), ("link", "href")}


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name in ("id", "name"):
                self.anchors.add(value)
            if (tag, name) in LOADED:
                self.loaded.append(value)
            if name in ("href", "src"):
                self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    said: list[str] = []

    class Warnings(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Warnings(logging.WARNING)
    log = logging.getLogger("mkdocs")
    log.addHandler(handler)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    finally:
        log.removeHandler(handler)
    assert not said, "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_every_public_module_has_a_page_with_its_docstring(site: Path) -> None:
    missing = []
    for package in ("wherefrom", "lightning_modules", "datamodules", "callbacks"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            elif any(part.startswith("_") for part in parts):
                continue
            if not (site / "api" / f"{'.'.join(parts)}.html").exists():
                missing.append(path)
    assert not missing
    text = (site / "api" / "wherefrom.models.diffusion.html").read_text()
    assert "DiffusionModel" in text
    assert "the mean over latent elements of (target - output)²" in text, "docstrings are there"


def test_no_link_is_dead_and_every_anchor_is_there(site: Path, pages: dict[Path, Page]) -> None:
    dead = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links are from the site's root
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                dead.append(f"{path.relative_to(site)}: {link}")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors | {"__skip"}:
                dead.append(f"{path.relative_to(site)}: {link} (no such anchor)")
    assert not dead


def test_nothing_is_loaded_from_the_network(site: Path, pages: dict[Path, Page]) -> None:
    outside = {link for page in pages.values() for link in page.loaded if urlsplit(link).netloc}
    assert not outside
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"url\(\s*[\"']?(?:https?:)?//", styles)
    assert not re.findall(r"@import\s+[\"'](?:https?:)?//", styles)


def test_pages_that_are_read_in_the_repository_have_no_dead_link() -> None:
    dead = []
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    for folder in ("docs", "results", "weights"):
        files += sorted((ROOT / folder).rglob("*.md"))
    for file in files:
        text = re.sub(r"```.*?```|`[^`]*`", "", file.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            parts = urlsplit(link)
            if not parts.scheme and parts.path and not (file.parent / parts.path).exists():
                dead.append(f"{file.relative_to(ROOT)}: {link}")
    assert not dead


def _there(path: str) -> bool:
    """Whether a printed path exists; NAME stands for any."""
    return "NAME" in path or (ROOT / path).exists()


def test_commands_name_files_that_there_are() -> None:
    """Configurations and scripts in printed commands exist."""
    missing = []
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/*/README.md"))]:
        text = file.read_text()
        named = re.findall(r"(?<![\w/])configs/[\w/]+\.yaml", text)
        named += [f"{a}/{b}.py" for a, b in re.findall(r"python\s+-m\s+(experiments|benchmarks)\.(\w+)", text)]
        missing += [f"{file.relative_to(ROOT)}: {each}" for each in named if not _there(each)]
    assert not missing
