"""What kohya's trainers make of a caption's text, but for what they draw at random."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import product

from wherefrom.data.layouts.base import CaptionLines
from wherefrom.data.layouts.caption_files import lines_of

SEPARATOR = ","
_MOST = 60
_WILDCARD = re.compile(r"\{([^}]+)\}")
# Stand for doubled braces while wildcards are looked for; no text of a caption holds a NUL.
_OPEN, _CLOSE = "\0<", "\0>"


@dataclass(frozen=True)
class CaptionRules:
    """Settings of a subset that decide its captions, as `process_caption` of sd-scripts applies them.

    Attributes:
        prefix: Stands before a text, with a blank.
        suffix: Stands after it.
        separator: Between tags, and between caption and tags.
        secondary: Becomes the separator once tags were shuffled.
        wildcard: Lines, and alternatives as `{red|blue}`, are drawn from.
        tags: Tags are shuffled or dropped: they are stripped and joined by commas also where they keep their order.
        keep: Parts that are not shuffled end here.
    """

    prefix: str = ""
    suffix: str = ""
    separator: str = SEPARATOR
    secondary: str = ""
    wildcard: bool = False
    tags: bool = False
    keep: str = ""

    @property
    def lines(self) -> CaptionLines:
        """What the lines of a text are."""
        return "each" if self.wildcard else "first"

    def captions(self, text: str, lines: CaptionLines, where: str) -> tuple[str, ...]:
        """The captions of a text, each as often as it is drawn.

        Args:
            text: The text, with its lines.
            lines: What they are.
            where: Where it stands, for errors.

        Raises:
            ValueError: A text with wildcards has too many captions.
        """
        text = f"{self.prefix} {text}" if self.prefix else text
        text = f"{text} {self.suffix}" if self.suffix else text
        several = text.split("\n") if lines == "each" else [text.split("\n")[0] if lines == "first" else text]
        drawn = [_alternatives(line, where) if self.wildcard else [line] for line in several]
        common = math.lcm(*map(len, drawn))
        if common * len(drawn) > _MOST:
            raise _too_many(where, common * len(drawn))
        return tuple(self._joined(caption) for each in drawn for caption in each for _ in range(common // len(each)))

    def _joined(self, caption: str) -> str:
        if self.tags:
            parts = caption.split(self.keep, 2) if self.keep else [caption]
            tags = [tag.strip() for part in parts for tag in part.strip().split(self.separator)]
            caption = ", ".join(tag for tag in tags if tag or len(parts) == 1)
        return caption.replace(self.secondary, self.separator) if self.secondary else caption

    def entry(self, caption: str, tags: str | None) -> str:
        """The text of an entry of a list, which has caption and tags."""
        if self.wildcard and tags is not None:
            tags = tags.replace("\n", self.separator)
            return "\n".join(f"{line}{self.separator}{tags}" for line in caption.split("\n") if line.strip())
        return self.separator.join(word for word in (caption, tags) if word)


def file_text(text: str, lines: CaptionLines) -> str:
    """What is taken of a caption file, before a subset's settings are applied."""
    if lines == "whole":
        return "\n".join(lines_of(text)).strip()
    if lines == "first":
        return lines_of(text)[0].strip()
    return "\n".join(line.strip() for line in lines_of(text) if line.strip())


def _alternatives(line: str, where: str) -> list[str]:
    """All texts that a line with wildcards can become, each as probable as any other."""
    parts = _WILDCARD.split(line.replace("{{", _OPEN).replace("}}", _CLOSE))
    choices = [part.split("|") if number % 2 else [part] for number, part in enumerate(parts)]
    count = math.prod(map(len, choices))
    if count > _MOST:
        raise _too_many(where, count)
    return ["".join(chosen).replace(_OPEN, "{").replace(_CLOSE, "}") for chosen in product(*choices)]


def _too_many(where: str, count: int) -> ValueError:
    return ValueError(
        f"{where}: its lines and wildcards make {count:,} captions, and {_MOST} is the limit. Write fewer, or take "
        "enable_wildcard out to read them as they stand."
    )
