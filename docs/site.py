"""Hooks of `mkdocs build`: one API page for every public module, and the repository's records that pages link to.

Pages link to records and cards outside `docs/` (`../results/…`, `../weights/…`), as one reads them in the repository.
The built site gets copies below `files/`, so that these links hold there too.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGES = ("wherefrom", "lightning_modules", "datamodules", "callbacks")
_OUTSIDE = re.compile(r"\]\((?:\.\./)+([^)#\s]+)(#[^)\s]*)?\)")


def modules() -> Iterator[str]:
    """Names of all public modules and packages."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not any(part.startswith("_") for part in parts):
                yield ".".join(parts)


def summary(module: str) -> str:
    """First line of a module's docstring; empty where it has none."""
    place = ROOT.joinpath(*module.split("."))
    source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not source.exists():
        return ""
    return (ast.get_docstring(ast.parse(source.read_text())) or "").partition("\n")[0]


def page_of(module: str) -> str:
    """Path of a module's page below `docs/`."""
    return f"api/{module}.md"


def _listing(title: str, names: list[str], page: str) -> str:
    folder = posixpath.dirname(page)
    lines = [f"- [`{name}`]({posixpath.relpath(page_of(name), folder)}) {summary(name)}" for name in names]
    return f"{title}\n\n" + "\n".join(lines) + "\n"


def _tree(names: list[str], module: str) -> dict[str, Any] | str:
    """A module's entry in the navigation: its page, or a package's page with those below it."""
    short, below = module.rpartition(".")[2], [name for name in names if name.rpartition(".")[0] == module]
    if not below:
        return {short: page_of(module)}
    return {short: [page_of(module), *(_tree(names, name) for name in below)]}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the API to the navigation."""
    names = list(modules())
    assert config.nav is not None
    config.nav[:] = [entry for entry in config.nav if "API" not in entry]
    config.nav.append({"API": ["api/index.md", *(_tree(names, package) for package in PACKAGES)]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the API's pages, and the files of the repository that pages link to."""
    every = list(modules())
    for name in every:
        below = [other for other in every if other.rpartition(".")[0] == name]
        text = f"---\ntitle: {name}\n---\n\n::: {name}\n"
        files.append(File.generated(config, page_of(name), content=_listing(text, below, page_of(name))))
    title = "# API\n\nEvery public module, from the docstrings."
    names = [name for name in every if name.count(".") <= 1]
    files.append(File.generated(config, "api/index.md", content=_listing(title, names, "api/index.md")))
    linked = [path for file in files.documentation_pages() for path in _linked(file.content_string)]
    while linked:  # a linked page may link on
        path = linked.pop()
        source, target = ROOT / path, f"files/{path}"
        if path.startswith("docs/"):
            continue
        if source.is_file() and files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(source)))
            if path.endswith(".md"):
                here = posixpath.dirname(path)
                links = re.findall(r"\]\(([^)#:\s]+)", source.read_text())
                linked += [posixpath.normpath(posixpath.join(here, link)) for link in links]
    return files


def _linked(text: str) -> list[str]:
    return [match[1] for match in _OUTSIDE.finditer(text)]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links out of `docs/` into links to the copies, and the copies' links to pages into links to the site's."""
    here = posixpath.dirname(page.file.src_uri)
    if page.file.src_uri.startswith("files/"):

        def inside(match: re.Match[str]) -> str:
            path = posixpath.normpath(posixpath.join(here, match[1]))
            site = path.removeprefix("files/docs/")
            return f"]({posixpath.relpath(site, here)}{match[2] or ''})"

        return re.sub(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)", inside, markdown)
    if page.file.src_uri.startswith("api/"):
        return markdown
    return _OUTSIDE.sub(
        lambda match: f"]({posixpath.relpath('files/' + match[1], here or '.')}{match[2] or ''})", markdown
    )
