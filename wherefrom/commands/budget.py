"""Budget of a run before it starts: passes, images and trainings, at rates that are measured here.

Only a few images and captions are read and encoded, a few passes and training steps run. Stages that an earlier run
left in the store are counted all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wherefrom.attributors.base import Attributor
from wherefrom.attributors.compute_estimate import ComputeStage, feature_stage
from wherefrom.commands.estimate import Stage, timed
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.data.image_set import ImageSet
from wherefrom.features.base import ImageEncoder, TextEncoder
from wherefrom.models.conditioning import Conditioning
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.types import TrainingData
from wherefrom.runtime.console import duration

_CAPTION = "an image of several things in the words of a caption"


@dataclass(frozen=True)
class Sizes:
    """How large the data are; see `datamodules.images.Census`.

    Attributes:
        training: Training images.
        held_out: Held-out images.
        size: (height, width) in pixels.
        captions: Captions of each image.
        half: Latents and prompt embeddings are kept in float16.
    """

    training: int
    held_out: int
    size: tuple[int, int]
    captions: int
    half: bool


def blank_images(count: int, size: tuple[int, int], captions: int) -> ImageSet:
    """So many images of nothing, which take no memory but for their ids."""
    pixels = np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (count, *size, 3))
    ids = tuple(map(str, range(count)))
    return ImageSet(ids, ((_CAPTION,) * captions,) * count, pixels, {"license": ("",) * count}, "blank")


def blank_latents(images: ImageSet, latent: Tensor, conditioning: Conditioning) -> EncodedImages:
    """Latents and conditioning of the right shapes, which take no memory."""
    count, captions = len(images), len(images.captions[0]) if len(images) else 1
    return EncodedImages.of_one_shape(
        images,
        latents=latent.new_zeros(()).expand(count, 2, *latent.shape),
        conditioning=conditioning.map(lambda each: each.new_zeros(()).expand(count, captions, *each.shape)),
        empty=conditioning,
        fingerprint="blank",
        mapped=True,
    )


def encoding(model: DiffusionModel, sizes: Sizes, decode_s: float) -> tuple[list[Stage], TrainingData]:
    """Decoding and encoding, and data of the right shapes for everything that comes after.

    Args:
        model: The model with its encoder.
        sizes: How large the data are.
        decode_s: Seconds to read one image.

    Raises:
        ValueError: The model has no encoder.
    """
    encoder = model.encoder
    if encoder is None:
        raise ValueError("The model has no encoder, so images cannot be brought to it.")
    encoder.text.sized(sizes.size)
    made: list[Tensor] = []
    encoded: list[Conditioning] = []
    pixels = torch.zeros(1, 3, *sizes.size)

    def encode_one_image() -> int:
        made.append(encoder.encode_pixels(pixels)[0])
        return 1

    def encode_caption() -> int:
        encoded.append(encoder.text.encode([_CAPTION]).at(0))
        return 1

    encode_one_image(), encode_caption()  # the first also sets things up
    image_s, caption_s = timed(encode_one_image), timed(encode_caption)
    latent, one = made[-1], encoded[-1]
    count, width = sizes.training + sizes.held_out, 2 if sizes.half else 4
    stages = [
        Stage(
            f"read {count:,} images of {sizes.size[1]} × {sizes.size[0]}",
            count * decode_s,
            count * 3 * np.prod(sizes.size).item(),
        ),
        Stage(
            f"latents of {count:,} images and their mirror images",
            2 * count * image_s,
            2 * count * latent.numel() * width,
        ),
        Stage(
            f"prompt embeddings of {count * sizes.captions:,} captions",
            count * sizes.captions * caption_s,
            count * sizes.captions * sum(each.numel() for each in one.values()) * width,
        ),
    ]
    training, held_out = (blank_images(n, sizes.size, sizes.captions) for n in (sizes.training, sizes.held_out))
    null = None if not sizes.held_out else blank_latents(held_out, latent, one)
    return stages, TrainingData(training, blank_latents(training, latent, one), held_out if null else None, null)


def features(encoder: ImageEncoder | TextEncoder, data: TrainingData, name: str) -> Stage:
    """Features of all images or of their first captions by an encoder, at the rate measured on a few."""
    return _timed_stage(feature_stage(encoder, data, name), rate=1.0)


def method(
    name: str, *, attributor: Attributor, data: TrainingData, queries: int, rate: float, candidates: int | None = None
) -> list[Stage]:
    """What a method computes once, and for each query; see `Attributor.stages`.

    Args:
        name: Of the method.
        attributor: The method.
        data: Data of the right shapes.
        queries: How many images are attributed.
        rate: Forward passes a second.
        candidates: Each query is scored against so many images; None is all.
    """
    stages = attributor.stages(data, queries=queries, name=name, candidates=candidates)
    return [_timed_stage(stage, rate) for stage in stages]


def _timed_stage(stage: ComputeStage, rate: float) -> Stage:
    """A method's stage in seconds: its passes at the measured rate, its encoder timed on a few samples."""
    seconds, disk = stage.passes / rate, stage.disk
    if stage.encode is not None:
        _, width = stage.encode()  # the first also sets things up
        encode = stage.encode
        seconds += stage.encoded * timed(lambda: encode()[0])
        disk += 4 * stage.encoded * width
    if stage.queries is None:
        return Stage(stage.name, seconds, disk, stage.memory)
    return Stage(stage.name, seconds, disk, stage.memory, each="a query", times=stage.queries)


def drawing(queries: int, steps: int, guidance: float, rate: float) -> Stage:
    """Images drawn from prompts."""
    return Stage("draw the queries", steps * (2 if guidance != 1 else 1) / rate, each="a query", times=queries)


def as_table(stages: Sequence[Stage], devices: int) -> str:
    """The stages in Markdown, and what they come to.

    Args:
        stages: The stages.
        devices: Devices that share the work evenly.
    """
    rows = ["| stage | time | | disk | memory |", "|---|--:|---|--:|--:|"]
    for stage in stages:
        if stage.total(devices) == stage.disk == stage.memory == 0:
            continue  # nothing that anyone waits for
        often = f"× {stage.times:,} ({_time(stage.seconds / devices)} {stage.each})" if stage.each else ""
        cells = (stage.name, _time(stage.total(devices)), often, _size(stage.disk), _size(stage.memory))
        rows.append(f"| {' | '.join(cells)} |")
    disk, memory = sum(stage.disk for stage in stages), max((stage.memory for stage in stages), default=0)
    total = sum(stage.total(devices) for stage in stages)
    rows.append(f"| all | {_time(total)} | | {_size(disk)} | {_size(memory)} |")
    return "\n".join(rows)


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def _size(count: int) -> str:
    if count == 0:
        return ""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
