"""How train.py and evaluate.py are given what the library calls an option of data."""

from __future__ import annotations

_OPTIONS = (
    "caption",
    "captions",
    "columns",
    "image",
    "image_column",
    "layout",
    "license",
    "one_caption",
    "size",
    "trigger",
)
_OF_FOLDERS = ("layout: sidecar", "caption_lines: first or whole", "on_error: skip")
# What the library calls an option -> how it is given here.
DATA_WORDS = {
    **{f"the option '{name}'": f"data.init_args.options.{name}" for name in _OPTIONS},
    **{each: f"data.init_args.options.{each}" for each in _OF_FOLDERS},
    "the options 'image_column' and 'caption'": "data.init_args.options.image_column and caption",
    "the option 'subset'": "data.init_args.subset",
    "in subset,": "in data.init_args.subset,",
    "set buckets": "set data.init_args.options.framing.buckets",
}
