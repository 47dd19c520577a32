"""Builds the API reference from the docstrings: `make docs`, or `python docs/reference.py FOLDER`."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

ROOT = Path(__file__).parents[1]

PACKAGES = ("wherefrom", "callbacks", "datamodules", "lightning_modules")


def modules() -> list[str]:
    """All modules of all packages but the private ones."""
    result = []
    for name in PACKAGES:
        package = importlib.import_module(name)
        for public in getattr(package, "__all__", ()):
            setattr(package, public, getattr(package, public))  # what is imported when it is asked for
        below = pkgutil.walk_packages(package.__path__, f"{name}.")
        result += [name, *(each.name for each in below if "._" not in each.name)]
    return result


def main() -> None:
    """Writes a page a module, and an index."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs")
    sys.path.insert(0, str(ROOT))
    # Shapes of named tuples (`Float[Tensor, "b c"]`) are shown as they are written.
    warnings.filterwarnings("ignore", "Error parsing type annotation", UserWarning)
    # A package without `__all__` brings its modules along, which are named here too.
    warnings.filterwarnings("ignore", "The module specification", UserWarning)
    pdoc.render.configure(docformat="google", footer_text="wherefrom")
    pdoc.pdoc(*modules(), output_directory=folder)
    print(folder / "index.html")


if __name__ == "__main__":
    main()
