"""CLIP's tokenizer from the vocabulary that open_clip carries, for models whose file holds none."""

from __future__ import annotations

import gzip
from functools import cache
from importlib.resources import files

from transformers import CLIPTokenizer

_TOKENS = 77
_WORDS = 49408  # of which the last two begin and end a text
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


@cache
def _merges() -> tuple[tuple[str, ...], ...]:
    """Which pairs of pieces are joined, the first first."""
    packed = files("open_clip").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    return tuple(tuple(line.split()) for line in lines[1 : _WORDS - 2 * 256 - len(_SPECIAL) + 1])


def _bytes() -> list[str]:
    """The letter that stands for each byte, in the vocabulary's order: first those that print."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte) for byte in printing] + [chr(256 + number) for number in range(len(others))]


def clip_tokenizer(pad: str) -> CLIPTokenizer:
    """CLIP's tokenizer, as Stable Diffusion's pipelines have it.

    Args:
        pad: What fills captions up: the end token, or `!` where the model was trained so.
    """
    letters = _bytes()
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["".join(merge) for merge in _merges()]
    vocabulary = {word: number for number, word in enumerate([*words, *_SPECIAL])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(_merges()), pad_token=pad, model_max_length=_TOKENS)
