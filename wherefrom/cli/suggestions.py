"""A command line whose words may be mistyped: the error names what was probably meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn


def suggestion(word: str, known: Sequence[str]) -> str:
    """` Did you mean …?` where one of the known words is close; empty where none is."""
    close = difflib.get_close_matches(word, known, 1, 0.6)
    return f" Did you mean {close[0]}?" if close else ""


class SuggestingParser(argparse.ArgumentParser):
    """Refuses a word as argparse does, and adds the flag or the command that is closest to it."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        unknown = re.match(r"unrecognized arguments: (--?[\w-]+)", message)
        chosen = re.search(r"invalid choice: '([^']*)'", message)
        if unknown:
            message += "." + suggestion(unknown.group(1), [*self._option_string_actions])
        elif chosen:
            words = [str(word) for action in self._actions for word in action.choices or ()]
            message += "." + suggestion(chosen.group(1), words)
        super().error(message)
