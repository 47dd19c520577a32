"""CLIP skip: prompts and captions read before CLIP's last layers, as some checkpoints were trained and are used.

The count is diffusers': 0 reads what the pipeline reads when nothing is asked for, 1 one layer before. A1111 and others
count from 1, so their "Clip skip: 2" is 1 here.
"""

from __future__ import annotations

import copy
from typing import Any

from wherefrom.models.diffusion import DiffusionModel


def with_clip_skip(model: DiffusionModel, skip: int) -> DiffusionModel:
    """The model with captions and prompts read some layers before CLIP's last; it shares all parts with the first.

    Args:
        model: The model, which stays as it is.
        skip: How many layers; 0 is none.

    Raises:
        ValueError: The model has no encoder, its text encoder is no CLIP, or has no more layers than are skipped.
    """
    text: Any = None if model.encoder is None else model.encoder.text
    if skip == getattr(text, "clip_skip", 0):
        return model
    if model.encoder is None:
        raise ValueError("The model has no text encoder, of which clip_skip could leave layers out.")
    result, encoder = copy.copy(model), copy.copy(model.encoder)
    encoder.text = copy.copy(text)
    encoder.text.skip_layers(skip)
    result.encoder = encoder
    return result
