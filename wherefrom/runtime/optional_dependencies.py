"""Imports of optional dependencies, with errors that name the extra to install."""

from __future__ import annotations

import importlib
from importlib.metadata import distributions
from types import ModuleType

_CHOICE = "pip install 'wherefrom[cpu]' or pip install 'wherefrom[gpu]', exactly one of them"


def require_faiss() -> ModuleType:
    """Imports `faiss`, which comes with exactly one of the extras `cpu` and `gpu`.

    Raises:
        ImportError: FAISS is not installed, or its CPU and GPU distributions overwrite each other.
    """
    names = (distribution.name.lower().replace("_", "-") for distribution in distributions())
    installed = sorted({name for name in names if name.startswith(("faiss-cpu", "faiss-gpu"))})
    if len(installed) > 1:
        raise ImportError(
            f"{' and '.join(installed)} are installed together and overwrite each other's module faiss. "
            f"Run pip uninstall {' '.join(installed)}, then {_CHOICE}."
        )
    try:
        return importlib.import_module("faiss")
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise
        raise ImportError(f"This needs FAISS, which is not installed: {_CHOICE}.", name="faiss") from error


def require_peft(why: str) -> ModuleType:
    """Imports `peft`, which wraps layers with adapters.

    Args:
        why: What needs it, for the error message.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError(
            f"{why} needs peft, which is not installed: pip install 'wherefrom[lora]'.", name="peft"
        ) from error


def require_datasets(why: str) -> ModuleType:
    """Imports `datasets`, which reads data sets of Hugging Face's hub.

    Args:
        why: What needs it, for the error message.

    Raises:
        ImportError: `datasets` is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ImportError(
            f"{why} needs datasets, which is not installed: pip install 'wherefrom[datasets]'.", name="datasets"
        ) from error


def require_pandas() -> ModuleType:
    """The module `pandas`, which notebooks have and nothing else here needs.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        return importlib.import_module("pandas")
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        raise ImportError(
            "A table of scores needs pandas, which is not installed: pip install 'wherefrom[notebook]'.", name="pandas"
        ) from error
