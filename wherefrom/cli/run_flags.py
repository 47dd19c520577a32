"""The flags of `attribute` and `compare`, and the request that they make of a file and themselves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wherefrom.cli.entry import Help
from wherefrom.cli.run_file import DEFAULT_METHOD, Request, parse_settings, read_request
from wherefrom.cli.run_sizes import add_size_flags, bucket_numbers, size_text
from wherefrom.cli.suggestions import SuggestingParser

DETAILS = """\
queries:
  --query FILE --prompt TEXT   an image and the prompt that made it
  --query FILE                 an image with the prompt that its own file states, as AUTOMATIC1111,
                               ComfyUI and others write it; else the prompt is not known
  --prompt TEXT                no image: it is drawn from the model
  Repeat them for several queries. A --prompt belongs to the --query just before it;
  one that follows another --prompt, or stands first, is drawn.

images:
  A folder whose layout is found out and said, the first of these that it is of (--layout NAME
  overrides):
    imagefolder  metadata.jsonl, .csv or .parquet with file_name, text, license, author, ...
    save_to_disk what Dataset.save_to_disk of Hugging Face's datasets left
    toml         kohya's or musubi's dataset.toml itself
    list         kohya's or musubi's JSON or JSON lines
    kohya        folders such as 10_name, seen ten times an epoch
    sidecar      a.jpg beside a.txt or a.caption
    parquet      a parquet file, or a folder of them, with the images in a column
    images       images alone, with --one-caption
    hub          OWNER/NAME, a data set of Hugging Face's hub
  All are ranked. Where rows have a split, those of train are, and those of validation are the
  null: images that the model was never trained on, which p-values are measured against. --split
  and --null choose others.
  They are brought to the model's own size as --fit says, unless --size or --buckets asks for
  others.

file:
  -c FILE.yaml holds the same by these keys; flags win over it:
    model: MODEL
    images: FOLDER
    queries: [{image: generated.png, prompt: a red bus}, {prompt: a fox}]
    method: abu_plus
    settings: {unlearning.noise_samples: 500}

several devices:
  torchrun --nproc-per-node 2 -m wherefrom.cli COMMAND ...
"""


class Asked(argparse.Action):
    """Collects `--query` and `--prompt` in their order: a prompt belongs to the query just before it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Begins a query, or gives the last one its prompt."""
        asked: list[dict[str, str]] = list(getattr(namespace, "asked", None) or [])
        if option == "--query":
            asked.append({"image": values})
        elif asked and "image" in asked[-1] and "prompt" not in asked[-1]:
            asked[-1] = {**asked[-1], "prompt": values}
        elif not values.strip():
            parser.error("--prompt: an image cannot be drawn from an empty prompt.")
        else:
            asked.append({"prompt": values})
        namespace.asked = asked


def run_parser(command: str, line: str, example: str) -> argparse.ArgumentParser:
    """The flags of a command that asks a model about queries."""
    made = SuggestingParser(
        prog=f"wherefrom {command}",
        description=f"{line[0].upper()}{line[1:]}.",
        epilog=f"example:\n\n  {example}\n\n{DETAILS}",
        formatter_class=Help,
        usage=f"wherefrom {command} --model MODEL --images FOLDER [--query FILE] [--prompt TEXT] [options]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("-c", "--config", metavar="FILE", help="a YAML file; see below")
    add("--model", metavar="MODEL", help="a diffusers pipeline (folder or hub id), or a single .safetensors file")
    add("--base", metavar="MODEL", help="the pipeline that a trainer's checkpoint or a file without all parts is of")
    add(
        "--lora",
        action="append",
        metavar="FILE[:WEIGHT]",
        help="an adapter trained on the model, as style.safetensors:0.8; a folder or hub id; may be repeated",
    )
    add("--images", metavar="FOLDER", help="the training images with their captions; see below")
    add("--query", action=Asked, dest="asked", metavar="FILE", help="an image to attribute")
    add(
        "--prompt",
        action=Asked,
        dest="asked",
        metavar="TEXT",
        help="its prompt (default: the file's own); or alone, to draw an image",
    )
    several = "; repeat it for each" if command == "compare" else ""
    add(
        "--method",
        action="append",
        metavar="NAME",
        help=f"a name of `wherefrom methods`, or a YAML file{several} (default: {DEFAULT_METHOD})",
    )
    add("--set", action="append", metavar="KEY=VALUE", help="change a setting, as unlearning.noise_samples=500")
    add("--quick", action="store_true", help="a first look: few timesteps and noise samples")
    add("--output", metavar="RUN", help="the run folder (default: one below wherefrom-runs)")
    add("--store", metavar="FOLDER", help="where what is computed once is kept (default: cache)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add("--resize", action="store_true", help="bring query images to the training images' size")
    add_size_flags(made)
    add("--layout", metavar="NAME", help="layout of the training images (default: found out and said)")
    add(
        "--caption",
        metavar="COLUMN",
        help="caption column, or suffix of caption files (default: found out)",
    )
    add("--image-column", metavar="COLUMN", help="the column of images, in a table that has several")
    add("--one-caption", metavar="TEXT", help="caption of all images of a folder without captions ('' for no words)")
    add("--trigger", metavar="WORD", help="what stands for [trigger] in captions")
    add("--caption-lines", metavar="HOW", help="a caption file's lines are read: each, first or whole")
    add(
        "--split", action="append", metavar="NAME", help="rank images of this split; repeat it, or all (default: train)"
    )
    add("--null", metavar="WHAT", help="never trained on: a split, a FOLDER, or none (default: validation)")
    add("--seed", type=int, metavar="N", help="seed of drawn images (default: 0)")
    add("--sampling-steps", type=int, metavar="N", help="sampling steps of drawn images (default: 50)")
    add("--guidance", type=float, metavar="X", help="classifier-free guidance of drawn images (default: 2)")
    add("--eta", type=float, metavar="X", help="0 is DDIM, 1 with all timesteps DDPM (default: 0)")
    add("--clip-skip", type=int, metavar="N", help="read captions N layers before CLIP's last, as diffusers counts")
    add("--top", type=int, metavar="N", help="training images that the page shows (default: 20)")
    add("--group", action="append", dest="groups", metavar="COLUMN", help="show shares of this column's groups")
    add("--title", metavar="TEXT", help="title of the page")
    return made


def request_of(options: argparse.Namespace) -> Request:
    """The file's values and the flags, which win.

    Raises:
        ValueError: The file or a setting cannot be used.
    """
    values: dict[str, Any] = read_request(Path(options.config)) if "config" in options else {}
    given = {key: value for key, value in vars(options).items() if key not in ("config", "asked", "set")}
    if "size" in given:
        given["size"] = size_text(given["size"], "--size")
    if "buckets" in given:
        given["buckets"] = bucket_numbers(given["buckets"], "--buckets")
    values |= {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    if "asked" in options:
        values["queries"] = tuple(options.asked)
    if "set" in options:
        values["settings"] = {**(values.get("settings") or {}), **parse_settings(options.set)}
    return Request(**values)


def request_from(command: str, line: str, example: str, words: Sequence[str]) -> Request:
    """The request of a command's words."""
    return request_of(run_parser(command, line, example).parse_args(list(words)))
