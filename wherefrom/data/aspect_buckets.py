"""Aspect buckets: sizes of about one area, of which each image takes that of the nearest aspect ratio.

The rule is that of kohya's sd-scripts (`BucketManager`), so that images are cut as its trainings saw them: an image
goes to the bucket whose width / height is nearest to its own, is resized until it covers the bucket, and its centre is
cut out. Without enlarging, an image keeps its aspect ratio and loses what is over whole steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from wherefrom.models.image_sizes import Size, words_of

# sd-scripts' defaults, which are meant for images of at least this resolution; smaller ones take them to scale.
_MIN_SIDE, _MAX_SIDE, _STEP, _RESOLUTION = 256, 1024, 64, 512


@dataclass(frozen=True)
class Buckets:
    """Which buckets there are; what is left out is as in sd-scripts, to scale for small images.

    Attributes:
        resolution: Side of the square whose area no bucket exceeds; None is the size of the images.
        min_side: Shortest side of a bucket, in pixels.
        max_side: Longest side of a bucket.
        step: Sides are multiples of it.
        upscale: Enlarge small images to their bucket; otherwise they get one of their own size, in whole steps.

    Raises:
        ValueError: A number is below 1.
    """

    resolution: int | None = None
    min_side: int | None = None
    max_side: int | None = None
    step: int | None = None
    upscale: bool = True

    def __post_init__(self) -> None:
        for name in ("resolution", "min_side", "max_side", "step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"buckets: {name} is a number of pixels from 1 on; given {value}.")

    def resolved(self, size: Size, multiple: int = 1) -> Buckets:
        """The same buckets with every number said.

        Args:
            size: (height, width) of the images, for the resolution that is left out.
            multiple: Pixels of which each side must be a multiple: those of a latent's cell, or of a patch.

        Raises:
            ValueError: There is no bucket, or the step is no multiple of what the model takes.
        """
        resolution = self.resolution or math.isqrt(size[0] * size[1])
        scale = min(1.0, resolution / _RESOLUTION)
        step = self.step or max(int(_STEP * scale) // multiple, 1) * multiple
        made = replace(
            self,
            resolution=resolution,
            min_side=self.min_side or max(int(_MIN_SIDE * scale) // step, 1) * step,
            max_side=self.max_side or max(int(_MAX_SIDE * scale), resolution),
            step=step,
        )
        if step % multiple:
            raise ValueError(
                f"buckets: step {step} is no multiple of {multiple}, as the sides of the model's images are."
            )
        if resolution < step or made.max_side is None or made.max_side < resolution:
            raise ValueError(
                f"buckets: with resolution {resolution}, step must be no larger and max_side no smaller; given step "
                f"{step} and max_side {made.max_side}."
            )
        if made.min_side is None or made.min_side > resolution:
            raise ValueError(f"buckets: min_side {made.min_side} is larger than the resolution, {resolution}.")
        return made

    def _said(self) -> tuple[int, int, int, int]:
        said = self.resolution, self.min_side, self.max_side, self.step
        assert None not in said, "buckets are resolved first"
        return said  # type: ignore[return-value]

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(height, width) of all buckets of the area, in the order of width and height."""
        return _sizes(*self._said())

    def place(self, size: Size) -> tuple[Size, Size]:
        """Where an image goes: (height, width) of its bucket, and to which it is resized before its centre is cut out.

        Args:
            size: (height, width) of the image.

        Raises:
            ValueError: The image is too small for a bucket of its own size.
        """
        height, width = size
        if self.upscale:
            ratio = width / height
            bucket = (
                size
                if size in self.sizes
                else min(self.sizes, key=lambda each: abs(each[1] / each[0] - ratio))  # the first of several
            )
            scale = bucket[0] / height if ratio > bucket[1] / bucket[0] else bucket[1] / width
            return bucket, (int(height * scale + 0.5), int(width * scale + 0.5))
        resolution, _, _, step = self._said()
        resized = self._reduced(size) if height * width > resolution**2 else size
        bucket = resized[0] - resized[0] % step, resized[1] - resized[1] % step
        if min(bucket) < step:
            raise ValueError(
                f"an image of {words_of(size)} pixels is smaller than a bucket's step, {step}, and buckets.upscale is "
                "false. Leave it out, or set buckets.upscale: true"
            )
        return bucket, resized

    def _reduced(self, size: Size) -> Size:
        """(height, width) of a large image brought to the area, with one side in whole steps."""
        resolution, _, _, step = self._said()
        ratio = size[1] / size[0]

        def in_steps(side: float) -> int:
            return int(side + 0.5) - int(side + 0.5) % step

        width = math.sqrt(resolution**2 * ratio)
        by_width, by_height = in_steps(width), in_steps(resolution**2 / width)
        beside_width, beside_height = in_steps(by_width / ratio), in_steps(by_height * ratio)
        error_of_width = abs(by_width / beside_width - ratio) if beside_width else math.inf
        error_of_height = abs(beside_height / by_height - ratio) if by_height else math.inf
        if error_of_width < error_of_height:
            return int(by_width / ratio + 0.5), by_width
        return by_height, int(by_height * ratio + 0.5)


@lru_cache(maxsize=64)
def _sizes(resolution: int, min_side: int, max_side: int, step: int) -> tuple[Size, ...]:
    side = resolution // step * step
    found = {(side, side)}
    for width in range(min_side, max_side + 1, step):
        height = min(max_side, resolution**2 // width // step * step)
        if height >= min_side:
            found |= {(width, height), (height, width)}
    return tuple((height, width) for width, height in sorted(found))
