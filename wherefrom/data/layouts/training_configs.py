"""Data set configurations in TOML, as kohya's sd-scripts and musubi-tuner are given them.

Settings of `[general]`, of a data set and of a subset are found in that order, the last one winning. What decides which
images are trained on, how often, and with which caption is taken; what changes captions or images at random during
training is said, for it is not replayed.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wherefrom.data.layouts.base import (
    SUFFIXES,
    FileReader,
    Found,
    Place,
    ReadingOptions,
    Row,
    check_inside,
    counted,
    finished_rows,
    shown,
)
from wherefrom.data.layouts.caption_files import captions_beside, with_trigger
from wherefrom.data.layouts.image_lists import SEPARATOR, list_rows

REGULARIZATION = "is_reg"
_LARGEST = 2**20
# What is taken from a configuration.
_TAKEN = frozenset(
    {
        "image_dir",
        "image_directory",
        "metadata_file",
        "image_jsonl_file",
        "num_repeats",
        "class_tokens",
        "is_reg",
        "caption_extension",
        "caption_prefix",
        "caption_suffix",
        "caption_separator",
        "enable_wildcard",
        "subsets",
    }
)
# What happens to captions and images at random while training: said where it is switched on.
_RANDOM = frozenset(
    {
        "shuffle_caption",
        "keep_tokens",
        "keep_tokens_separator",
        "secondary_separator",
        "caption_dropout_rate",
        "caption_dropout_every_n_epochs",
        "caption_tag_dropout_rate",
        "token_warmup_min",
        "token_warmup_step",
        "color_aug",
        "flip_aug",
        "random_crop",
        "face_crop_aug_range",
    }
)
# What decides sizes; and what decides speed, or where things are kept.
_SIZES = frozenset(
    {
        "resolution",
        "enable_bucket",
        "min_bucket_reso",
        "max_bucket_reso",
        "bucket_reso_steps",
        "bucket_no_upscale",
    }
)
_SILENT = frozenset(
    {
        "batch_size",
        "cache_info",
        "cache_directory",
        "debug_dataset",
        "network_multiplier",
        "custom_attributes",
        "max_token_length",
        "prior_loss_weight",
        "resize_interpolation",
        "skip_image_resolution",
        "validation_seed",
    }
)
# What weighs pixels, holds images out, or names other training images than pairs of an image and a caption.
_REFUSED = (
    "conditioning_data_dir",
    "control_directory",
    "control_path",
    "video_directory",
    "video_jsonl_file",
    "validation_split",
    "alpha_mask",
)


@dataclass(frozen=True)
class _Subset:
    """One subset's settings, `[general]`'s and the data set's included."""

    settings: Mapping[str, Any]
    where: str
    data_set: int

    @property
    def key(self) -> tuple[int, str, str]:
        """What the trainer tells subsets of a data set apart by."""
        names = ("metadata_file", "image_jsonl_file"), ("image_dir", "image_directory")
        listed, folder = ("/".join(self.text(name) for name in pair) for pair in names)
        return self.data_set, listed, "" if listed != "/" else folder

    def text(self, name: str, default: str = "") -> str:
        value = self.settings.get(name, default)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: {name} is {value!r}; it should be a text.")
        return value

    @property
    def repeats(self) -> int:
        value = self.settings.get("num_repeats", 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{self.where}: num_repeats is {value!r}; it should be a whole number.")
        return value


@dataclass
class _Read:
    """Rows so far: images of the training, and regularization images in their order."""

    images: list[Row] = field(default_factory=list)
    regularization: list[Row] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def _subsets(path: Path) -> Iterator[_Subset]:
    """The subsets of a configuration.

    Raises:
        ValueError: It is no TOML, has no subset, or a setting names what is no image with a caption.
    """
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, which is no configuration.")
    try:
        tree = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid TOML ({error}).") from error
    general, sets = tree.get("general", {}), tree.get("datasets")
    if not isinstance(general, dict) or not isinstance(sets, list) or not all(isinstance(each, dict) for each in sets):
        raise ValueError(f"{path} is no data set configuration: it should hold [[datasets]] of subsets with image_dir.")
    for number, each in enumerate(sets):
        subsets = each.get("subsets")
        if subsets is None and ("image_directory" in each or "image_jsonl_file" in each):  # musubi-tuner
            subsets = [{}]
        if not isinstance(subsets, list) or not subsets or not all(isinstance(one, dict) for one in subsets):
            raise ValueError(f"{path}: datasets[{number}] has no [[datasets.subsets]] with image_dir or metadata_file.")
        for place, subset in enumerate(subsets):
            settings = {**general, **each, **subset}
            where = f"{path}, subset {place + 1} of data set {number + 1}"
            for name in _REFUSED:
                if settings.get(name):
                    raise ValueError(
                        f"{where}: {name} is not supported: training images are pairs of a whole image and a caption, "
                        "all of them trained on. Give a configuration of such images, without it."
                    )
            yield _Subset(settings, where, number)


def _folder(base: Path, given: str, where: str) -> Path:
    """A folder or file that the configuration names: absolute, or relative to the configuration's own folder."""
    path = base / given
    if not path.exists():
        raise ValueError(
            f"{where}: there is no {given!r}{'' if Path(given).is_absolute() else f' in {base}'}. Paths are relative "
            "to the folder of the configuration."
        )
    return path


def _name(base: Path, path: Path) -> str:
    """An image's id: its path below the configuration's folder, or as it is."""
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.resolve().as_posix()


def _words(subset: _Subset, captions: Sequence[str]) -> tuple[str, ...]:
    """Captions with the subset's prefix and suffix, as the trainer puts them."""
    before, after = subset.text("caption_prefix"), subset.text("caption_suffix")
    return tuple(f"{before} {each}" if before else each for each in _suffixed(captions, after))


def _suffixed(captions: Sequence[str], after: str) -> Iterator[str]:
    yield from (f"{each} {after}" if after else each for each in captions)


def _rows_of(subset: _Subset, base: Path, options: ReadingOptions) -> tuple[list[Row], list[str]]:
    """The images of one subset, by their paths, each with its captions."""
    listed = subset.text("metadata_file") or subset.text("image_jsonl_file")
    given = subset.text("image_dir") or subset.text("image_directory")
    if not listed and not given:
        raise ValueError(f"{subset.where} has neither image_dir nor metadata_file.")
    if listed:
        path = _folder(base, listed, subset.where)
        folder = _folder(base, given, subset.where) if given else path.parent
        rows, lines = list_rows(path, folder, options, subset.text("caption_separator", SEPARATOR))
    else:
        folder = _folder(base, given, subset.where)
        rows, lines = _beside(subset, folder, options)
    repeats = subset.repeats
    made = [
        replace(
            row,
            name=(name := _name(base, folder / row.name)),
            id=name,
            captions=_words(subset, row.captions),
            columns={**row.columns, "file_name": name},
            repeats=repeats,
        )
        for row in rows
    ]
    return made, lines


def _beside(subset: _Subset, folder: Path, options: ReadingOptions) -> tuple[list[Row], list[str]]:
    """Images directly in a folder, captions in files beside them, or else the class tokens."""
    if not folder.is_dir():
        raise ValueError(f"{subset.where}: {folder} is not a folder.")
    files = frozenset(path.name for path in folder.iterdir() if path.is_file())
    images = sorted(name for name in files if Path(name).suffix.lower() in SUFFIXES)
    check_inside(folder, images)
    usual = ".caption" if subset.text("image_dir") else ".txt"  # of sd-scripts and of musubi-tuner
    extension = subset.text("caption_extension", usual)
    asked = replace(options, caption=extension if extension.startswith(".") else f".{extension}")
    lines = "each" if subset.settings.get("enable_wildcard") else "first"
    class_tokens = subset.settings.get("class_tokens")
    rows, without = list[Row](), list[str]()
    for name in images:
        captions = captions_beside(folder, name, files, asked, "each" if lines == "each" else "first")
        if captions is None:
            without.append(name)
            captions = (subset.text("class_tokens"),)
        captions = with_trigger(captions, f"{folder / name}", options.trigger)
        rows.append(Row(f"{folder / name}", name, name, captions, "", {"license": "unknown"}))
    if not without:
        return rows, []
    what = f"the class tokens {class_tokens!r}" if class_tokens is not None else "''"
    return rows, [
        f"{counted(len(without), 'image')} in {folder} without a {extension} file, whose caption is {what}: "
        f"{shown(without)}"
    ]


def _regularization(rows: Sequence[Row], wanted: int) -> list[Row]:
    """Regularization images with the repeats that the trainer gives them, so that they are as many as the others.

    In their order they are taken with their own repeats until there are enough, and then once more each in turn; those
    that come after enough are never seen.

    Args:
        rows: The regularization images with their own repeats.
        wanted: Sum of the other images' repeats.
    """
    repeats: Counter[int] = Counter()
    total, first = 0, True
    while total < wanted and rows:
        for number, row in enumerate(rows):
            step = row.repeats if first else 1
            repeats[number] += step
            total += step
            if total >= wanted:
                break
        first = False
    return [replace(row, repeats=repeats[number]) for number, row in enumerate(rows) if repeats[number]]


def _merged(rows: Sequence[Row]) -> list[Row]:
    """One row for an image that several subsets name, such as one for each resolution: seen as often as in all.

    Raises:
        ValueError: Its captions differ between subsets.
    """
    merged: dict[str, Row] = {}
    for row in rows:
        other = merged.get(row.id)
        if other is not None and (other.captions, other.columns) != (row.captions, row.columns):
            raise ValueError(
                f"{row.where}: the image {row.id!r} comes in two subsets with other captions: {other.captions[0]!r} "
                f"and {row.captions[0]!r}. Give it one caption, or attribute the subsets apart."
            )
        merged[row.id] = row if other is None else replace(other, repeats=other.repeats + row.repeats)
    return list(merged.values())


def _said(subsets: Sequence[_Subset]) -> list[str]:
    """What is not replayed, what decides sizes, and what is not known."""
    on: dict[str, str] = {}
    sizes: dict[str, str] = {}
    unknown: set[str] = set()
    for subset in subsets:
        for name, value in subset.settings.items():
            if name in _RANDOM and value not in (False, 0, 0.0, "", None):
                on[name] = f"{name} = {value!r}"
            elif name in _SIZES:
                sizes[name] = f"{name} = {value!r}"
            elif name not in _TAKEN and name not in _SILENT and name not in _RANDOM and name not in _REFUSED:
                unknown.add(name)
    lines = []
    if on:
        lines.append(
            "changed at random in training and not replayed, so that losses are those of images and captions as they "
            f"stand: {', '.join(on[name] for name in sorted(on))}"
        )
    if sizes:
        lines.append(f"sizes are this run's own, not the configuration's {', '.join(sizes[n] for n in sorted(sizes))}")
    if unknown:
        lines.append(f"settings that are not known, and are taken to change no caption: {shown(sorted(unknown))}")
    return lines


class TrainingConfigLayout:
    """A `.toml` of kohya's sd-scripts or of musubi-tuner, given itself."""

    name = "toml"
    needs = "the data set configuration of kohya's trainers (.toml), given itself"
    contains: frozenset[str] = frozenset()

    def find(self, place: Place, options: ReadingOptions) -> Found | None:
        """By the file's suffix."""
        if place.path.suffix.lower() != ".toml" or not place.path.is_file():
            return None
        return Found("a data set configuration")

    def read(self, place: Place, options: ReadingOptions) -> FileReader:
        """The images of all subsets.

        Raises:
            ValueError: The configuration or a subset cannot be used.
        """
        if not place.path.is_file():
            raise ValueError(f"{place.given} is no file. Give {self.needs}.")
        base, subsets, read = place.path.parent, list(_subsets(place.path)), _Read()
        seen: set[tuple[int, str, str]] = set()
        for subset in subsets:
            if subset.key in seen:  # the trainer takes the first
                read.lines.append(
                    f"{subset.where} has the folder or list of an earlier one there, and is not trained on"
                )
                continue
            seen.add(subset.key)
            rows, lines = _rows_of(subset, base, options)
            read.lines += lines
            if not rows:
                raise ValueError(f"{subset.where} holds no image. Take it out, or correct its folder.")
            if subset.repeats < 1:
                many = counted(len(rows), "image")
                read.lines.append(f"{subset.where}: num_repeats is 0, so nothing is trained on its {many}")
            elif subset.settings.get("is_reg"):
                read.regularization += rows
            else:
                read.images += rows
        if not read.images:
            raise ValueError(f"{place.given} names no training image besides regularization images.")
        wanted = sum(row.repeats for row in read.images)
        kept = _regularization(read.regularization, wanted)
        rows = [*read.images, *kept]
        if read.regularization:
            rows = [replace(row, columns={**row.columns, REGULARIZATION: "false"}) for row in read.images]
            rows += [replace(row, columns={**row.columns, REGULARIZATION: "true"}) for row in kept]
            unused = len(read.regularization) - len(kept)
            more = f", of which {unused:,} are never seen" if unused else ""
            read.lines.append(
                f"{counted(len(read.regularization), 'regularization image')}{more}, repeated to {wanted:,} as the "
                "trainer does; they are ranked too"
            )
        return FileReader(self.name, finished_rows(_merged(rows)), base, lines=[*read.lines, *_said(subsets)])
