"""The command line: which command, its help, and errors in one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from wherefrom.cli.suggestions import SuggestingParser
from wherefrom.runtime.cli_errors import mistakes_in_one_line, option_names, spoken_words

DESCRIPTION = """\
Which training images did this image come from?

Attributes images that a text-to-image diffusion model drew to the images it was trained on.
"""
EXAMPLES = """\
examples:

  wherefrom attribute --model MODEL --images FOLDER --query generated.png --prompt "a red bus"

  wherefrom attribute --model MODEL --images FOLDER --prompt "a red bus" --quick

  wherefrom compare --model MODEL --images FOLDER --prompt "a red bus" --method abu_plus --method trak

  wherefrom budget attribute --model MODEL --images FOLDER --prompt "a red bus"

  wherefrom methods

wherefrom COMMAND --help says more of one command.
"""
# What the library calls an option -> how it is given here.
WORDS = {
    "the option 'base'": "--base",
    "queries.resize: true": "--resize",
    "queries.regions": "regions in the -c file",
    "queries.prompts": "--prompt",
    "queries.images": "--query",
    "queries:": "--query:",
    "the option 'caption'": "--caption",
    "the option 'image_column'": "--image-column",
    "the options 'image_column' and 'caption'": "--image-column and --caption",
    # Columns are not chosen here: what is in the way is changed in the metadata.
    "Name the columns to keep in the option 'columns'.": "Write it as text, or take the column out of the metadata.",
    ", or leave it out of the option 'columns'": ", or rename the column",
    "Take it out of the option 'columns'.": "Rename the column, or take it out of the metadata.",
    "the option 'layout'": "--layout",
    "layout: sidecar": "--layout sidecar",
    "layout:": "--layout:",
    "the option 'one_caption'": "--one-caption",
    "the option 'trigger'": "--trigger",
    "caption_lines: first or whole": "--caption-lines first or whole",
    "caption_lines is": "--caption-lines is",
    "caption:": "--caption:",
    "null: none, split: all": "--null none --split all",
    "null: none": "--null none",
    "split: all": "--split all",
    "null:": "--null:",
    "in split:": "in --split",
    "split:": "--split:",
    "the option 'size'": "--size",
    "on_error: skip": "--on-error skip",
    "on_error is": "--on-error is",
    "buckets.upscale: true": "no upscale=false in --buckets",
    "set buckets": "give --buckets",
    "buckets:": "--buckets:",
    "size:": "--size:",
    "pad_color is": "--pad-color is",
    "model:": "--model:",
    "lora:": "--lora:",
    "the option 'lora'": "--lora",
    "images:": "--images:",
    "method:": "--method:",
    "settings:": "--set:",
    "device:": "--device:",
    "sampling_steps must": "--sampling-steps must",
    "guidance must": "--guidance must",
    "seed must": "--seed must",
    "clip_skip ": "--clip-skip ",
    "Ask for a smaller relative_loss_increase, or give alpha instead": "Give --set "
    "unlearning.relative_loss_increase=0.2, or less",
    "The data set has no column": "--group: the images have no column",
}
# Command -> where it is defined and a line about it. What a command needs is imported when it is chosen.
COMMANDS = {
    "attribute": ("wherefrom.cli.attribution_commands", "rank training images by their influence on generated ones"),
    "compare": ("wherefrom.cli.attribution_commands", "the same by several methods: costs, agreement, images"),
    "budget": ("wherefrom.cli.attribution_commands", "what `attribute` or `compare` would take, before it runs"),
    "report": ("wherefrom.cli.report_command", "write the page of a finished run folder once more"),
    "methods": ("wherefrom.cli.methods_command", "list the methods that --method takes"),
    "index": ("wherefrom.cli.index_commands", "remove images from a search index, restore them, list what was removed"),
    "convert": ("wherefrom.cli.convert_commands", "files of other projects into what is used here, and back"),
}


class Help(argparse.RawDescriptionHelpFormatter):
    """Texts as they are written, with room for the options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def parser() -> argparse.ArgumentParser:
    """The command line without any command's options, which are read by the command."""
    root = SuggestingParser(
        prog="wherefrom",
        description=DESCRIPTION,
        epilog="commands:\n"
        + "".join(f"\n  {name:<10} {line}" for name, (_, line) in COMMANDS.items())
        + "\n\n"
        # argparse's own list of subcommands would break these lines
        + EXAMPLES,
        formatter_class=Help,
        usage="wherefrom COMMAND [options]",
        allow_abbrev=False,
    )
    root.add_argument("--version", action="store_true", help="print the version")
    root.add_argument("command", nargs="?", metavar="COMMAND", choices=[*COMMANDS], help=argparse.SUPPRESS)
    return root


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake is one line and status 1, a wrong word status 2."""
    words = sys.argv[1:] if args is None else list(args)
    for stream in (sys.stdout, sys.stderr):  # captions may hold what a Windows console cannot show
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    # The root reads up to the command; what follows is the command's.
    place = next((index for index, word in enumerate(words) if not word.startswith("-")), len(words))
    root = parser()
    options = root.parse_args(words[: place + 1])
    if options.version:
        import wherefrom

        print(f"wherefrom {wherefrom.__version__}")
        return
    if options.command is None:
        root.print_help()
        raise SystemExit(2)
    run: Callable[[str, Sequence[str]], None] = import_module(COMMANDS[options.command][0]).run
    with mistakes_in_one_line(called_from_python=args is not None), option_names(WORDS), spoken_words(WORDS):
        try:
            run(options.command, words[place + 1 :])
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from what is finished", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:  # whoever read the output, such as `head`, has enough
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  what Python flushes on its way out
        except ImportError as error:
            if "pip install" not in str(error):  # an optional part that is missing says how to get it
                raise
            raise ValueError(str(error)) from error
