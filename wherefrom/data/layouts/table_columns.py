"""What the columns of a table of images hold, by their types and by what Hugging Face's `datasets` says of them.

Everything is read as plain values: a feature's description is data, no name in it is looked up, nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from wherefrom.data.image_metadata import CAPTION_COLUMNS
from wherefrom.data.layouts.base import shown

_OWN = ("id", "split", "file_name", "license")  # columns with a meaning of their own
_PICKLED = b"arrow.py_extension_type"
_LABELS = "ClassLabel"


@dataclass(frozen=True)
class TableColumns:
    """Which column is what.

    Attributes:
        image: The column of images.
        caption: The column of captions.
        kept: Further columns that are read, those with a meaning of their own included.
        labels: Column of numbers -> what each number means.
        left: Columns that are neither text, numbers nor the images, and are not read.
    """

    image: str
    caption: str
    kept: tuple[str, ...]
    labels: Mapping[str, Sequence[str]]
    left: tuple[str, ...]

    @property
    def read(self) -> list[str]:
        """All columns that are read but the images."""
        return [self.caption, *(name for name in self.kept if name != self.caption)]


def features_of(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What `datasets` wrote about the columns into the schema; nothing where it did not write the table."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(said, dict):
        return {}
    return {name: feature for name, feature in said.items() if isinstance(feature, dict)}


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_encoded(kind: pa.DataType) -> bool:
    """Whether a type is that of encoded files: a struct of bytes and path."""
    if not pa.types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    return set(fields) == {"bytes", "path"} and _is_binary(fields["bytes"])


def image_columns(schema: pa.Schema) -> list[str]:
    """Columns that may hold images, those that are said to first."""
    said = {name: feature.get("_type") for name, feature in features_of(schema).items()}
    by_type = [field.name for field in schema if _is_encoded(field.type) or _is_binary(field.type)]
    images = [name for name in by_type if said.get(name) == "Image"]
    return images or [name for name in by_type if name not in said or said[name] == "Value"]


def _is_plain(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        _is_string(kind)
        or types.is_boolean(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_decimal(kind)
        or types.is_temporal(kind)
        or types.is_null(kind)
        or (types.is_dictionary(kind) and _is_plain(kind.value_type))
    )


def _holds_text(kind: pa.DataType) -> bool:
    """Text, or lists of it."""
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    kind = kind.value_type if listed else kind
    return _is_string(kind) or bool(pa.types.is_null(kind))


def columns_of(
    schema: pa.Schema,
    where: str,
    *,
    image: str | None = None,
    caption: str | None = None,
    columns: Collection[str] | None = None,
) -> TableColumns:
    """Finds out which column is what.

    Args:
        schema: The table's.
        where: Names it, for errors.
        image: The column of images; None finds it out.
        caption: The column of captions; None takes the first of `CAPTION_COLUMNS` that is there.
        columns: Further columns to keep; None keeps all that are text or numbers.

    Raises:
        ValueError: There is no column of images or captions, there are several of images, one that was asked for is not
            there or of another kind, or one holds pickled objects.
    """
    pickled = [field.name for field in schema if (field.metadata or {}).get(b"ARROW:extension:name") == _PICKLED]
    if pickled:
        raise ValueError(
            f"{where}: the column {pickled[0]!r} holds pickled objects, which are never read. Save it "
            "without this column."
        )
    names = list(schema.names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where} has two columns {twice[0]!r}. Rename one.")
    taken = _image_column(schema, where, image)
    looked_for = CAPTION_COLUMNS if caption is None else (caption,)
    there = [name for name in looked_for if name in names and _holds_text(schema.field(name).type)]
    if not there:
        raise ValueError(
            f"{where} has no column of captions called {' or '.join(map(repr, looked_for))}, only "
            f"{shown([name for name in names if name != taken]) or 'that of the images'}. Name the caption column in "
            "the option 'caption'."
        )
    rest = [name for name in names if name not in (taken, there[0])]
    for name in columns or ():
        if name not in rest and name != there[0]:
            raise ValueError(
                f"{where} has no column {name!r}, only {shown(rest)}. Take it out of the option 'columns'."
            )
    texts = {name for name in rest if _is_plain(schema.field(name).type)}
    texts |= {name for name in rest if name in CAPTION_COLUMNS and _holds_text(schema.field(name).type)}
    wanted = [name for name in rest if columns is None or name in columns or name in _OWN]
    for name in wanted:
        if name not in texts and (name in _OWN or columns is not None):
            raise ValueError(
                f"{where}: the column {name!r} is of the type {schema.field(name).type}, not text or numbers. "
                + ("Rename it." if name in _OWN else "Take it out of the option 'columns'.")
            )
    kept = tuple(name for name in wanted if name in texts and name != "captions")
    features = features_of(schema)
    labels = {
        name: [str(each) for each in features[name]["names"]]
        for name in kept
        if features.get(name, {}).get("_type") == _LABELS and isinstance(features[name].get("names"), list)
    }
    left = tuple(name for name in wanted if name not in texts)
    return TableColumns(taken, there[0], kept, labels, left)


def _image_column(schema: pa.Schema, where: str, image: str | None) -> str:
    found = image_columns(schema)
    if image is not None:
        if image not in found:
            raise ValueError(
                f"{where} has no column {image!r} of images; {'it has ' + shown(found) if found else 'it has none'}. "
                "Name another in the option 'image_column'."
            )
        return image
    if len(found) > 1:
        raise ValueError(
            f"{where} has several columns of images, {shown(found)}. Name one in the option 'image_column'."
        )
    if not found:
        lists = [field.name for field in schema if pa.types.is_nested(field.type)]
        raise ValueError(
            f"{where} has no column of images, which is binary, or a struct of bytes and path as `datasets` writes it"
            + (f"; columns of lists and other structs ({shown(lists)}) are not read" if lists else "")
            + f". It has {shown(schema.names)}."
        )
    return found[0]


def is_missing(cell: Any) -> bool:
    """Whether a cell says nothing."""
    return (
        cell is None or (isinstance(cell, float) and math.isnan(cell)) or (isinstance(cell, str) and not cell.strip())
    )


def as_text(cell: Any, labels: Sequence[str] | None = None) -> str:
    """A cell as text: '' where it says nothing, a label's name, a list of tags with commas."""
    if is_missing(cell):
        return ""
    if labels is not None and isinstance(cell, int) and 0 <= cell < len(labels):
        return labels[cell]
    if isinstance(cell, list):
        return ", ".join(as_text(one) for one in cell)
    return str(cell)


def captions_of(cell: Any, column: str) -> tuple[str, ...]:
    """The captions of a cell, at least one; a list of tags is one caption."""
    if isinstance(cell, list) and column != "tags":
        return tuple(as_text(one) for one in cell) or ("",)
    return (as_text(cell),)
