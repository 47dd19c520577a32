"""Cost of a method, known before it runs: forward passes of the model, images to encode, bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wherefrom.features.base import ImageEncoder, TextEncoder
from wherefrom.queries.types import TrainingData

_TIMING_SAMPLE = 16  # images or captions that an encoder is timed on
_TIMING_CAPTION = "an image of several things in the words of a caption"


@dataclass(frozen=True)
class ComputeEstimate:
    """Cost of a method, counted in forward passes of one sample (a backward pass counts as two).

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
    """One stage of a method's computation, as `Attributor.stages` reports it.

    Attributes:
        name: What is computed.
        passes: Forward passes of the model, once or for each query.
        disk: Bytes written to disk. Features of encoders are not included: their width is known only after `encode`.
        memory: Bytes of tensors held in memory beside the model.
        queries: Number of queries that the stage is repeated for; None is a stage that runs once.
        encode: Timing probe of an encoder: encodes a few samples and returns (number of samples, feature width). The
            caller times it to convert `encoded` to seconds. None where nothing is encoded.
        encoded: Number of images or captions that are encoded.
    """

    name: str
    passes: int = 0
    disk: int = 0
    memory: int = 0
    queries: int | None = None
    encode: Callable[[], tuple[int, int]] | None = None
    encoded: int = 0


def feature_stage(encoder: ImageEncoder | TextEncoder, data: TrainingData, name: str, flips: int = 1) -> ComputeStage:
    """Stage that encodes all training images, or one caption of each.

    Args:
        encoder: The encoder.
        data: The training images.
        name: The encoder's name, for the name of the stage.
        flips: 2 where the mirror images are encoded too.
    """
    count = len(data.images) * flips
    pixels = np.asarray(data.images.pixels[:1]).repeat(_TIMING_SAMPLE, axis=0)

    def encode() -> tuple[int, int]:
        made = (
            encoder.encode_images(pixels)
            if isinstance(encoder, ImageEncoder)
            else encoder.encode_texts([_TIMING_CAPTION] * _TIMING_SAMPLE)
        )
        return len(made), int(made.shape[1])

    return ComputeStage(f"features of {count:,} images by {name}", encode=encode, encoded=count)


def first_images(data: TrainingData, count: int | None) -> TrainingData:
    """The first `count` training images, for the cost of scoring that many candidates; all where `count` is None."""
    if count is None or data.latents is None:
        return data
    chosen = range(count)
    return TrainingData(data.images.subset(chosen), data.latents.subset(chosen), data.held_out, data.held_out_latents)
