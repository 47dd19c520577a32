"""The one size of a run: that of its training images, its queries, what it draws, and their latents."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from wherefrom.data.framing import AnySize, Framing, one_number, sides_of
from wherefrom.data.image_set import ImageSet
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.image_sizes import Size, latent_shape_of, own_size, size_step, words_of


@dataclass(frozen=True)
class RunSize:
    """The size of a run's images, and how images are brought to it.

    Attributes:
        size: (height, width) in pixels; with buckets, what is drawn has it, and images the size of their bucket.
        framing: How; its buckets are resolved.
        own: (height, width) that the model was made for; None where its configuration does not say.
        model: The model.
    """

    size: Size
    framing: Framing = Framing()
    own: Size | None = None
    model: DiffusionModel | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, model: DiffusionModel, size: AnySize | None = None, framing: Framing = Framing()) -> RunSize:
        """The size that is asked for, or else the model's own; checked against what the model can take.

        Args:
            model: The model, with its encoder.
            size: What is asked for; None is the resolution of the buckets, or else the model's own size.
            framing: How images are brought to it.

        Raises:
            ValueError: The model cannot take it or one of the buckets, or no size is known.
        """
        try:
            own: Size | None = own_size(model)
        except ValueError:
            if size is None or model.encoder is None:
                raise
            own = None
        if size is None and framing.buckets is not None:
            size = framing.buckets.resolution
        wanted = sides_of(size) if size is not None else own
        assert wanted is not None, "an unknown size was refused above"
        resolved = framing.resolved(one_number(wanted), size_step(model))
        latent_shape_of(model, wanted)
        if resolved.buckets is not None and resolved.buckets.upscale:
            for each in resolved.buckets.sizes:
                try:
                    latent_shape_of(model, each)
                except ValueError as error:
                    raise ValueError(
                        f"buckets: the largest are too large. {error} Or set a smaller max_side."
                    ) from error
        return cls(wanted, resolved, own, model)

    @property
    def option(self) -> AnySize:
        """The size as options hold it: a square's side as one number."""
        size = one_number(self.size)
        assert size is not None
        return size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is drawn."""
        assert self.model is not None
        return latent_shape_of(self.model, self.size)

    def line(self) -> str:
        """What is to be said about the size; "" where it is the model's own and the only one."""
        said = [] if self.own is None or self.own == self.size else [f"the model's own is {words_of(self.own)}"]
        buckets = self.framing.buckets
        if buckets is not None:
            count = f"{len(buckets.sizes)} sizes" if buckets.upscale else "sizes of their own"
            said.append(f"each in the nearest of {count}, in steps of {buckets.step}")
        return f"images are at {words_of(self.size)} pixels: {'; '.join(said)}" if said else ""

    def unfit(self, size: Size) -> str:
        """Why an image of this (height, width) does not belong here; "" where it does.

        Args:
            size: Its size.
        """
        buckets = self.framing.buckets
        if buckets is None:
            return "" if size == self.size else f"the images of this run are {words_of(self.size)}"
        try:
            bucket, _ = buckets.place(size)
        except ValueError as error:
            return str(error)
        return "" if bucket == size else f"which is the size of no bucket; the nearest is {words_of(bucket)}"

    def check_images(self, images: ImageSet) -> None:
        """Refuses images of another size than the run's.

        Raises:
            ValueError: An image has another size; says which option to change.
        """
        sizes = images.distinct_sizes
        if self.framing.buckets is None and len(sizes) > 1:
            shown = ", ".join(map(words_of, sizes[:5]))
            raise ValueError(f"images: they have {len(sizes)} sizes ({shown}). Bring them to one, or set buckets.")
        for size in sizes:
            if self.framing.buckets is None and size != self.size:
                whose = "the model's are" if self.size == self.own else "asked for are"
                raise ValueError(
                    f"images: they are {words_of(size)} pixels, {whose} {words_of(self.size)}. Bring them to that "
                    "size, or name theirs in the option 'size'."
                )
            if self.model is not None:
                latent_shape_of(self.model, size)

    def query_framing(self, resize: bool) -> tuple[AnySize | None, Framing]:
        """Size and framing with which a query's image is loaded."""
        return (self.option, self.framing) if resize else (None, replace(self.framing, buckets=None))


def run_size(given: RunSize | Size) -> RunSize:
    """A run's size from (height, width), where no more is asked for."""
    return given if isinstance(given, RunSize) else RunSize(given)


def check_latents(images: Any, model: DiffusionModel) -> None:
    """Refuses latents that are not of their images' size, such as ready-made ones.

    Args:
        images: The `EncodedImages`.
        model: The model.

    Raises:
        ValueError: A latent has another shape than its image's.
    """
    members = images.members
    for number, group in enumerate(images.groups):
        if not len(group):
            continue
        position = 0 if members is None else int(members[number][0])
        height, width = (int(side) for side in images.images.pixels[position].shape[:2])
        size = height, width
        wanted = latent_shape_of(model, size)
        if group.shape != wanted:
            shape, needed = ("×".join(map(str, each)) for each in (group.shape, wanted))
            raise ValueError(
                f"The latents of the training images are {shape}, but images of {words_of(size)} pixels have latents "
                f"of {needed}: they were made at another size. Set the option 'size' to that of the latents' images."
            )
