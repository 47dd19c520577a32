"""Ranges of settings that many classes share by name, checked where each is made: before anything long."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Range(NamedTuple):
    """What a setting must be.

    Attributes:
        holds: Whether a finite number is in the range.
        words: The range, for messages: what follows "must".
        whole: Whether it must be a whole number.
    """

    holds: Callable[[float], bool]
    words: str
    whole: bool = False


_COUNT = Range(lambda value: value >= 1, "be at least 1", whole=True)
_SEED = Range(lambda value: 0 <= value < 2**63, "be at least 0 and below 2^63", whole=True)
_SHARE = Range(lambda value: 0 <= value <= 1, "lie between 0 and 1")
_OTHER_THAN_ALL = Range(lambda value: 0 <= value < 1, "be at least 0 and less than 1")
_POSITIVE = Range(lambda value: value > 0, "be positive")
_NOT_NEGATIVE = Range(lambda value: value >= 0, "not be negative")
RANGES: Mapping[str, Range] = {
    "alpha": _NOT_NEGATIVE,
    "absolute_lambda": _NOT_NEGATIVE,
    "batch_size": _COUNT,
    "block_images": _COUNT,
    "block_queries": _COUNT,
    "caption_dropout": _SHARE,
    "captions": _COUNT,
    "damping": _NOT_NEGATIVE,
    "ema_decay": _OTHER_THAN_ALL,
    "eta": _SHARE,
    "every_n_steps": _COUNT,
    "flip_share": _SHARE,
    "guidance": _NOT_NEGATIVE,
    "kl_weight": _NOT_NEGATIVE,
    "largest_member": _COUNT,
    "layers_per_pass": _COUNT,
    "measurement_samples": _COUNT,
    "noise_samples": _COUNT,
    "outside": _OTHER_THAN_ALL,
    "prior_weight": _NOT_NEGATIVE,
    "queries_per_pass": _COUNT,
    "relative_lambda": _NOT_NEGATIVE,
    "relative_loss_increase": _POSITIVE,
    "resamplings": _COUNT,
    "rows": _COUNT,
    "samples_per_image": _COUNT,
    "sampling_steps": _COUNT,
    "second_order": _NOT_NEGATIVE,
    "seed": _SEED,
    "size": _COUNT,
    "smoothness": _NOT_NEGATIVE,
    "split_seed": _SEED,
    "steps": _COUNT,
    "subsample": _COUNT,
    "timesteps": _COUNT,
    "top": _COUNT,
    "validation_share": _OTHER_THAN_ALL,
    "word_lr": _POSITIVE,
    "workers": _COUNT,
}


def check_ranges(**values: Any) -> None:
    """Refuses settings that are out of their range; None is a setting that was not given.

    Args:
        values: Numbers by name, each a name of `RANGES`; YAML may have given anything.

    Raises:
        ValueError: One is no number, not finite, not whole where it must be, or out of its range.
    """
    for name, value in values.items():
        allowed = RANGES[name]
        if value is None:
            continue
        words = allowed.words
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            words = "be a finite number"
        elif allowed.whole and value != int(value):
            words = "be a whole number"
        elif allowed.holds(value):
            continue
        raise ValueError(f"{name} must {words}; given {value!r}.")
