"""`wherefrom index`: removes images from a search index on disk, restores them, and lists what was removed.

`python -m wherefrom.index` is its name of earlier releases.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wherefrom.data.image_set import read_ids
from wherefrom.index.catalog import IMAGE
from wherefrom.index.index import Index
from wherefrom.runtime.cli_errors import mistakes_in_one_line

EXAMPLES = """\
examples:

  {prog} remove INDEX ID ID

  {prog} remove INDEX --file removed.txt

  {prog} restore INDEX ID

  {prog} removed INDEX
"""


def parser(prog: str = "wherefrom index") -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog=prog,
        description="Remove images from a search index, restore them, and list what was removed.",
        epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in (
        ("remove", "images are never found again, nor when they are added again"),
        ("restore", "removed images may be added again"),
    ):
        changing = commands.add_parser(name, help=what, description=what)
        changing.add_argument("folder", type=Path, metavar="INDEX", help="the index")
        changing.add_argument("ids", nargs="*", metavar="ID", help="ids of images")
        changing.add_argument("--file", type=Path, help="a file with one id a line, besides")
        if name == "remove":
            changing.add_argument(
                "--unknown", action="store_true", help="also keep out ids that the index does not have, from now on"
            )
    listing = commands.add_parser("removed", help="list what was removed", description="list what was removed")
    listing.add_argument("folder", type=Path, metavar="INDEX", help="the index")
    return root


def change(options: argparse.Namespace) -> None:
    """`remove` and `restore`.

    Raises:
        ValueError: No image is named, or one to restore was not removed.
    """
    ids = [*(name.strip() for name in options.ids), *read_ids(options.file, "--file")]
    if not any(ids):
        raise ValueError("No image is named: give ids, or --file with one id a line.")
    index = Index(options.folder)
    if options.command == "restore":
        index.restore(ids)
    else:
        unknown = sorted(set(ids) - set(index.rows[IMAGE].to_pylist()) - index.removed)
        if unknown and not options.unknown:
            raise ValueError(
                f"{len(unknown)} of {len(set(ids))} ids are not in the index, such as {unknown[0]!r}, so nothing was "
                "removed: correct them, or give --unknown to keep them out from now on as well."
            )
        for name in index.remove(ids):
            print(f"not in the index, and kept out from now on: {name}")
    print(f"{len(index):,} images can be found; {len(index.removed):,} were removed")


def run(words: Sequence[str] | None, prog: str = "wherefrom index") -> None:
    """Runs the command line.

    Raises:
        ValueError: See `change`.
        FileNotFoundError: There is no such index or file.
    """
    options = parser(prog).parse_args(words)
    if options.command == "removed":
        print("\n".join(sorted(Index(options.folder).removed)))
    else:
        change(options)


def main(args: Sequence[str] | None = None) -> None:
    """`python -m wherefrom.index`: a user's mistake is one line, not a traceback."""
    print("python -m wherefrom.index is now: wherefrom index", file=sys.stderr)
    with mistakes_in_one_line(called_from_python=args is not None):
        run(args)


if __name__ == "__main__":
    main()
