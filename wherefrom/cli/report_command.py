"""`wherefrom report`: the page of a finished run folder once more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wherefrom.cli.entry import Help
from wherefrom.cli.suggestions import SuggestingParser


def run(command: str, words: Sequence[str]) -> None:
    """Writes the page.

    Raises:
        ValueError: The folder holds no finished run, or what it was made from is not there any more.
    """
    parser = SuggestingParser(
        prog="wherefrom report",
        description="Write the page of a finished run folder once more; nothing is computed.",
        epilog="example:\n\n  wherefrom report wherefrom-runs/RUN --top 50",
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="a folder of attribute, compare or counterfactual")
    parser.add_argument("--top", type=int, help="training images of each query (default: as in the run)")
    parser.add_argument("--title", help="title of the page (default: as in the run)")
    parser.add_argument("--store", default="cache", metavar="FOLDER", help="where images are kept (default: cache)")
    options = parser.parse_args(list(words))

    from wherefrom.cli.rewritten_reports import rewrite

    for path in rewrite(options.folder, top=options.top, title=options.title, store=options.store):
        print(path)
