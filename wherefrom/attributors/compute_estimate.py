"""What a method costs before it runs: forward passes of the model, images to encode, bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wherefrom.features.base import ImageEncoder, TextEncoder
from wherefrom.queries.types import TrainingData

_SAMPLE = 16  # images or captions that an encoder is timed on
_CAPTION = "an image of several things in the words of a caption"


@dataclass(frozen=True)
class ComputeEstimate:
    """The size of a computation before it starts, counted in forward passes (a backward pass counts as two).

    Attributes:
        once: Forward passes once per model and training set.
        per_query: Forward passes for each query.
        disk: Bytes kept on disk.
        memory: Bytes of tensors held in memory beside the model.
    """

    once: int = 0
    per_query: int = 0
    disk: int = 0
    memory: int = 0


@dataclass(frozen=True)
class ComputeStage:
    """A part of what a method computes, as `Attributor.stages` reports it.

    Attributes:
        name: What is computed.
        passes: Forward passes of the model, once or for each query.
        disk: Bytes that it leaves on disk; of a stage that encodes, all but the features themselves.
        memory: Bytes that it holds in memory beside the model.
        queries: How many queries it is repeated for; None is once.
        encode: Encodes a few samples and returns how many, and the width of a feature vector; None where nothing is
            encoded. Whoever turns stages into seconds times it.
        encoded: Images or captions that are encoded.
    """

    name: str
    passes: int = 0
    disk: int = 0
    memory: int = 0
    queries: int | None = None
    encode: Callable[[], tuple[int, int]] | None = None
    encoded: int = 0


def feature_stage(encoder: ImageEncoder | TextEncoder, data: TrainingData, name: str, flips: int = 1) -> ComputeStage:
    """Features of all training images, or of their first captions.

    Args:
        encoder: The encoder.
        data: The training images.
        name: What the encoder is called.
        flips: 2 where the mirror images are encoded too.
    """
    count = len(data.images) * flips
    pixels = np.asarray(data.images.pixels[:1]).repeat(_SAMPLE, axis=0)

    def encode() -> tuple[int, int]:
        made = (
            encoder.encode_images(pixels)
            if isinstance(encoder, ImageEncoder)
            else encoder.encode_texts([_CAPTION] * _SAMPLE)
        )
        return len(made), int(made.shape[1])

    return ComputeStage(f"features of {count:,} images by {name}", encode=encode, encoded=count)


def first_images(data: TrainingData, count: int | None) -> TrainingData:
    """So many of the training images, to count the cost of scoring candidates only; all where `count` is None."""
    if count is None or data.latents is None:
        return data
    chosen = range(count)
    return TrainingData(data.images.subset(chosen), data.latents.subset(chosen), data.held_out, data.held_out_latents)
