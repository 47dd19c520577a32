"""Settings of a data set configuration in TOML: its subsets, and what is said of settings that are not replayed."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wherefrom.data.layouts.base import shown
from wherefrom.data.layouts.kohya_captions import SEPARATOR, CaptionRules

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
        "keep_tokens_separator",
        "secondary_separator",
        "subsets",
    }
)
# What happens to captions and images at random while training: said where it is switched on.
_RANDOM = frozenset(
    {
        "shuffle_caption",
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
_ON_TAGS = ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step")
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
        "keep_tokens",
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
class Subset:
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

    @property
    def musubi(self) -> bool:
        """Whether it is musubi-tuner's."""
        return "image_directory" in self.settings or "image_jsonl_file" in self.settings

    @property
    def rules(self) -> CaptionRules:
        """What is made of its captions."""
        settings = self.settings
        return CaptionRules(
            self.text("caption_prefix"),
            self.text("caption_suffix"),
            self.text("caption_separator", SEPARATOR) or SEPARATOR,
            self.text("secondary_separator"),
            wildcard=bool(settings.get("enable_wildcard")),
            tags=any(settings.get(name) for name in _ON_TAGS),
            keep=self.text("keep_tokens_separator"),
        )

    def text(self, name: str, default: str = "") -> str:
        """A setting that is a text."""
        value = self.settings.get(name, default)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: {name} is {value!r}; it should be a text.")
        return value

    @property
    def repeats(self) -> int:
        """How often an epoch sees each of its images."""
        value = self.settings.get("num_repeats", 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{self.where}: num_repeats is {value!r}; it should be a whole number.")
        return value


def subsets_of(path: Path) -> Iterator[Subset]:
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
            yield Subset(settings, where, number)


def said_of(subsets: Sequence[Subset]) -> list[str]:
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
