"""What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` of Hugging Face's `datasets` leave, read without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wherefrom.data.layouts.base import Found, Place, ReadingOptions, check_inside
from wherefrom.data.layouts.table_files import ArrowTable
from wherefrom.data.layouts.table_reader import TableReader, read_tables
from wherefrom.data.split_names import split_named

_STATE, _DICT = "state.json", "dataset_dict.json"


class SavedDatasetLayout:
    """A folder of Arrow files with `state.json`, or one such folder a split with `dataset_dict.json` above."""

    name = "save_to_disk"
    needs = f"what Dataset.save_to_disk left: {_STATE} (or {_DICT}) with its .arrow files"
    contains: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()

    def find(self, place: Place, options: ReadingOptions) -> Found | None:
        """By the file that lists the others."""
        for name in (_DICT, _STATE):
            if (place.path / name).is_file():
                return Found(name)
        return None

    def read(self, place: Place, options: ReadingOptions) -> TableReader:
        """The rows of all splits; see `read_tables`."""
        folder = place.path
        if not (folder / _DICT).is_file():
            return read_tables(self.name, place.given, _tables(folder, "", ""), options)
        splits = _listed(folder / _DICT, "splits")
        unknown = [name for name in splits if split_named(name) is None]
        if unknown and len(unknown) < len(splits):
            raise ValueError(
                f"{folder / _DICT} names the split {unknown[0]!r} beside {splits}, and whether the model was trained "
                "on it is not known. Save the data set with the splits train, validation and test, or give the folder "
                "of one split."
            )
        tables = [table for name in splits for table in _tables(folder, name, split_named(name) or "")]
        return read_tables(self.name, place.given, tables, options, splits)


def _read(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Save the data set again.") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} is not a JSON object. Save the data set again.")
    return said


def _listed(path: Path, key: str) -> list[str]:
    names = _read(path).get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} does not list its {key}. Save the data set again.")
    return [_own(path, name) for name in names]


def _own(listed_in: Path, name: Any) -> str:
    """The name of something beside the file that lists it.

    Raises:
        ValueError: It is that of something elsewhere.
    """
    if not isinstance(name, str) or not name or Path(name).name != name or name.startswith(".") or "\0" in name:
        raise ValueError(f"{listed_in} names {name!r}, which is no file beside it. Save the data set again.")
    return name


def _tables(folder: Path, below: str, split: str) -> list[ArrowTable]:
    """The Arrow files that `state.json` lists, in its order."""
    state = folder / below / _STATE
    if not state.is_file():
        raise ValueError(f"{folder / below} holds no {_STATE}. Save the data set again.")
    said = _read(state)
    if said.get("_indices_data_files"):
        raise ValueError(
            f"{state} selects rows by a list of indices, as old versions of `datasets` wrote. Load the data set and "
            "save it again."
        )
    files = said.get("_data_files")
    if not isinstance(files, list) or not files:
        raise ValueError(f"{state} lists no data files. Save the data set again.")
    made = []
    for each in files:
        name = _own(state, each.get("filename") if isinstance(each, dict) else None)
        path = folder / below / name
        check_inside(folder, [path.relative_to(folder).as_posix()])
        if not path.is_file():
            raise ValueError(f"{state} names {name!r}, which is not there. Copy the whole folder.")
        made.append(ArrowTable(path, f"{below}/{name}" if below else name, split))
    return made
