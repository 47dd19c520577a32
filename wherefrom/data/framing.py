"""How an image file becomes pixels of a size: what a trainer's data loader decides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from PIL import Image, ImageColor, ImageOps

from wherefrom.data.aspect_buckets import Buckets
from wherefrom.models.image_sizes import Size
from wherefrom.runtime.stable_names import added_setting

Fit = Literal["crop", "pad", "stretch"]
Exif = Literal["apply", "ignore"]
Alpha = Literal["white", "drop"]
AnySize = int | tuple[int, int]  # the side of a square, or (height, width)


def sides_of(size: AnySize) -> Size:
    """(height, width).

    Raises:
        ValueError: A side is below 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size {size} is not a number of pixels. Give at least 1, or None.")
    return height, width


def one_number(size: AnySize | None) -> AnySize | None:
    """The same size; a square's side as one number, lists as tuples."""
    if size is None or isinstance(size, int):
        return size
    height, width = size
    return height if height == width else (height, width)


@dataclass(frozen=True)
class Framing:
    """How images are brought to their size; training images and queries alike.

    Attributes:
        fit: `crop` cuts out the centre, `pad` keeps the whole image between margins, `stretch` changes its aspect
            ratio.
        pad_color: Colour of the margins: a name, `#rrggbb` or `rgb(…)`.
        exif: `apply` turns photographs upright as their EXIF data say, `ignore` leaves them as they are stored.
        alpha: Transparent images are put on `white`; `drop` takes the colours that lie under the transparency.
        buckets: Bring each image to the size nearest to its own aspect ratio instead of all to one.

    Raises:
        ValueError: An unknown choice or colour.
    """

    fit: Fit = added_setting("crop")
    pad_color: str = added_setting("white")
    exif: Exif = added_setting("apply")
    alpha: Alpha = added_setting("white")
    buckets: Buckets | None = added_setting(None)

    def __post_init__(self) -> None:
        for name, kind in (("fit", Fit), ("exif", Exif), ("alpha", Alpha)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is one of {', '.join(get_args(kind))}; given {getattr(self, name)!r}.")
        try:
            ImageColor.getrgb(self.pad_color)
        except ValueError as error:
            raise ValueError(f"pad_color is a colour such as white or #808080; given {self.pad_color!r}.") from error

    def of_one_size(self) -> None:
        """Refuses buckets, where all images are brought to one size.

        Raises:
            ValueError: There are buckets.
        """
        if self.buckets is not None:
            raise ValueError("buckets: these images are brought to one size; only folders of images go into buckets.")

    def resolved(self, size: AnySize | None, multiple: int = 1) -> Framing:
        """The same with the buckets' numbers said; see `Buckets.resolved`.

        Raises:
            ValueError: The buckets have neither a size nor a resolution, or cannot be made.
        """
        if self.buckets is None:
            return self
        if size is None:
            if self.buckets.resolution is None:
                raise ValueError("buckets: their area is not known. Set the option 'size', or resolution.")
            size = self.buckets.resolution
        return replace(self, buckets=self.buckets.resolved(sides_of(size), multiple))

    def place(self, size: Size, wanted: AnySize | None) -> tuple[Size, Size | None]:
        """(height, width) that an image gets; and that to which it is resized before its centre is cut out, if any.

        Args:
            size: (height, width) of the image.
            wanted: The size that is asked for; None keeps the image's own.

        Raises:
            ValueError: The image is too small for a bucket.
        """
        if self.buckets is not None:
            return self.resolved(wanted).buckets.place(size)  # type: ignore[union-attr]
        if wanted is None:
            return size, None
        height, width = sides_of(wanted)
        scale = max(height / size[0], width / size[1])
        return (height, width), (max(height, int(size[0] * scale + 0.5)), max(width, int(size[1] * scale + 0.5)))

    def upright(self, image: Image.Image) -> Image.Image:
        """A copy of an opened image, turned upright if that is asked for."""
        return ImageOps.exif_transpose(image) if self.exif == "apply" else image.copy()

    def opaque(self, image: Image.Image) -> Image.Image:
        """The image as RGB."""
        if image.has_transparency_data and self.alpha == "white":
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

    def fitted(self, image: Image.Image, wanted: AnySize | None) -> Image.Image:
        """The image at its size.

        Args:
            image: An RGB image.
            wanted: The size that is asked for; None keeps the image's own, unless there are buckets.

        Raises:
            ValueError: The image is too small for a bucket.
        """
        wanted = one_number(wanted)
        (height, width), resized = self.place((image.height, image.width), wanted)
        if resized is None:
            return image
        if self.fit == "stretch":
            return image.resize((width, height), Image.Resampling.LANCZOS)
        if self.fit == "pad":
            return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color=self.pad_color)
        if isinstance(wanted, int) and self.buckets is None:  # cut out before resizing, which costs less
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            return image.crop((left, top, left + side, top + side)).resize((wanted, wanted), Image.Resampling.LANCZOS)
        if resized != (image.height, image.width):
            image = image.resize((resized[1], resized[0]), Image.Resampling.LANCZOS)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
