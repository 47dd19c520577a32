"""The text in which the Stable Diffusion web UI (AUTOMATIC1111, Forge, SD.Next) writes how an image was made.

Prompt, `Negative prompt: …`, and a last line `Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, …`.
"""

from __future__ import annotations

import json
import re

# A value in quotes may hold commas. No two parts of this can match the same text, so a long line takes linear time.
_SETTING = re.compile(r'[ \t]*(\w[\w \-/]{0,60}):[ \t]*("(?:\\.|[^\\"])*"|[^,"][^,]*|)(?:,|$)')
_NETWORK = re.compile(r"<(\w{1,20}):([^<>]{1,300})>")
_WEIGHTED = re.compile(r"(?<!\\)[()\[\]]|\bBREAK\b|\bAND\b")
_FEWEST = 3  # settings that make a line one of settings
_LORAS = ("lora", "lyco")
_LONGEST_LINE = 1 << 16
NEGATIVE = "Negative prompt:"


def parse_infotext(text: str) -> tuple[str, str | None, dict[str, str]]:
    """Splits the text into prompt, negative prompt (None where there is none) and settings by their names."""
    *lines, last = text.strip().split("\n")
    settings = _settings(last)
    if len(settings) < _FEWEST:
        settings = {}
        lines.append(last)
    prompt: list[str] = []
    negative: list[str] | None = None
    for line in lines:
        line = line.strip()
        if negative is None and line.startswith(NEGATIVE):
            negative = [line.removeprefix(NEGATIVE).strip()]
        else:
            (prompt if negative is None else negative).append(line)
    return "\n".join(prompt), None if negative is None else "\n".join(negative), settings


def _settings(line: str) -> dict[str, str]:
    result: dict[str, str] = {}
    line, place = line[:_LONGEST_LINE], 0
    while place < len(line):
        found = _SETTING.match(line, place)
        if found is None:  # to the next comma
            comma = line.find(",", place)
            if comma < 0:
                break
            place = comma + 1
            continue
        place = max(found.end(), place + 1)
        name, value = found.group(1).strip(), found.group(2).strip()
        if value.startswith('"'):
            try:
                value = str(json.loads(value))
            except ValueError:
                value = value.strip('"')
        result.setdefault(name, value)
    return result


def is_infotext(text: str) -> bool:
    """Whether a text that could be anything is such a one: its last line says Steps and two settings more."""
    last = text.strip().rsplit("\n", 1)[-1]
    settings = _settings(last)
    return "Steps" in settings and len(settings) >= _FEWEST


def without_networks(prompt: str) -> tuple[str, list[tuple[str, float | None]]]:
    """The prompt as the text encoder saw it: `<lora:name:0.8>` and its like are taken out, as the web UI does.

    Returns:
        The prompt, and the LoRAs' names and weights (None where the tag states none as a number).
    """
    loras: list[tuple[str, float | None]] = []

    def take(found: re.Match[str]) -> str:
        kind, (name, *rest) = found.group(1), found.group(2).split(":")
        if kind in _LORAS:
            loras.append((name.strip(), number_of(rest[0].rpartition("=")[2]) if rest else None))
        return ""

    return _NETWORK.sub(take, prompt).strip(), loras


def number_of(value: object) -> float | None:
    """A finite number from a text or a number; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 1e9 else None


def has_weights(prompt: str) -> bool:
    """Whether the prompt has what the web UI reads as attention: `(word:1.2)`, `[word]`, `BREAK`, `AND`."""
    return _WEIGHTED.search(prompt) is not None
