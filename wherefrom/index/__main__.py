"""Takes images down from an index on disk.

python -m wherefrom.index remove FOLDER ID …                  # never found again, nor when they are added again
python -m wherefrom.index remove FOLDER --file take_downs.txt # one id a line
python -m wherefrom.index restore FOLDER ID …                 # may be added again
python -m wherefrom.index removed FOLDER                      # what was taken down
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from wherefrom.index.index import Index
from wherefrom.runtime.cli_errors import mistakes_in_one_line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = root.add_subparsers(dest="command", required=True)
    for name, what in (("remove", "takes images down"), ("restore", "lets them be added again")):
        changing = commands.add_parser(name, help=what)
        changing.add_argument("folder", type=Path, help="the index")
        changing.add_argument("ids", nargs="*", help="ids of images")
        changing.add_argument("--file", type=Path, help="a file with one id a line, besides")
    listing = commands.add_parser("removed", help="what was taken down")
    listing.add_argument("folder", type=Path, help="the index")
    return root


def change(options: argparse.Namespace) -> None:
    """`remove` and `restore`.

    Raises:
        ValueError: No image is named, or one to restore was not taken down.
    """
    listed = [] if options.file is None else options.file.read_text().splitlines()
    ids = [name for name in (*options.ids, *listed) if name]
    if not ids:
        raise ValueError("No image is named: give ids, or --file with one id a line.")
    index = Index(options.folder)
    if options.command == "restore":
        index.restore(ids)
    else:
        for name in index.remove(ids):
            print(f"not in the index, and kept out from now on: {name}")
    print(f"{len(index):,} images can be found; {len(index.removed):,} were taken down")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake is one line, not a traceback."""
    options = parser().parse_args(args)
    with mistakes_in_one_line(called_from_python=args is not None):
        if options.command == "removed":
            print("\n".join(sorted(Index(options.folder).removed)))
        else:
            change(options)


if __name__ == "__main__":
    main()
