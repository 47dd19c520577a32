"""`wherefrom methods`: the packaged methods with a line each."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from wherefrom.cli.entry import Help
from wherefrom.cli.suggestions import SuggestingParser


def run(command: str, words: Sequence[str]) -> None:
    """Prints the methods."""
    from wherefrom.commands.method_files import available_methods
    from wherefrom.commands.packaged_methods import DEFAULT_METHOD

    parser = SuggestingParser(
        prog="wherefrom methods", description="The methods that --method takes.", formatter_class=Help
    )
    parser.parse_args(list(words))
    methods = available_methods()
    width = max(map(len, methods)) + 2
    for name, line in methods.items():
        said = f"{line} (the default)" if name == DEFAULT_METHOD else line
        columns = max(shutil.get_terminal_size((100, 24)).columns - 1, width + 20)
        print(textwrap.fill(said, columns, initial_indent=f"{name:<{width}}", subsequent_indent=" " * width))
